"""Find a LoRA on civitai.com: the download address of a version, or of a model's newest version."""

import io
import json
from urllib.parse import urlencode

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import fetch_to
from sdxl_worker.assets.located import Located
from sdxl_worker.assets.references import CivitaiReference
from sdxl_worker.errors import FetchFailed, NotFound
from sdxl_worker.settings import Settings

ORIGIN = "https://civitai.com"
MAX_ANSWER = 8 << 20
AUTH_HINT = "set CIVITAI_API_TOKEN to an API key from your Civitai account settings"


def locate(reference: CivitaiReference, settings: Settings, budget: Budget) -> Located:
    """The version's download address, with the token for civitai.com only; raises FetchError subclasses."""
    version = reference.version or _newest_version(reference, settings, budget)
    query = f"?{urlencode(reference.options)}" if reference.options else ""
    target = _target(f"{ORIGIN}/api/download/models/{version}{query}", reference, settings)
    return Located(target, identity=f"version:{version}")


def _newest_version(reference: CivitaiReference, settings: Settings, budget: Budget) -> int:
    """The model's first listed version, which is the newest (https://developer.civitai.com, GET /api/v1/models/:id)."""
    sink = io.BytesIO()
    target = _target(f"{ORIGIN}/api/v1/models/{reference.model}", reference, settings)
    fetch_to(sink, target, max_bytes=MAX_ANSWER, budget=budget)
    try:
        versions = json.loads(sink.getvalue())["modelVersions"]
        return int(versions[0]["id"])
    except IndexError:
        raise NotFound(f"{reference.shown} has no published version") from None
    except (ValueError, KeyError, TypeError):
        raise FetchFailed(f"Civitai's answer about {reference.shown} cannot be read") from None


def _target(url: str, reference: CivitaiReference, settings: Settings) -> Target:
    token = reference.token or settings.civitai_api_token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return Target(url, headers, login_path="/login", auth_hint=AUTH_HINT)
