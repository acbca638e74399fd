"""Civitai: links, `civitai:ID@VERSION`, AIR urns; a version's download address, or that of a model's newest one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import fetch_bytes
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.location import Location
from sdxl_worker.assets.references import RemoteReference, hashed_name
from sdxl_worker.assets.urls import encode_query, naming_query, split_http_url
from sdxl_worker.errors import BadReference, FetchFailed, NotFound
from sdxl_worker.masking import mask
from sdxl_worker.settings import Settings

MAX_ANSWER = 8 << 20
AUTH_HINT = "set CIVITAI_API_TOKEN to an API key from your Civitai account settings"

_HOSTS = frozenset({"civitai.com", "www.civitai.com"})
_ID = r"[0-9]{1,15}"
_FORM = re.compile(
    rf"(?i)(?:civitai|urn:air:[\w.\-]+:[\w.\-]+:civitai):(?P<model>{_ID})(?:@(?P<version>{_ID}))?(?:\.\w+)?"
)


@dataclass(frozen=True)
class CivitaiReference(RemoteReference):
    """A model version on civitai.com; `version` 0 = the newest of `model`. `options` choose among a version's files."""

    version: int
    model: int = 0
    options: tuple[tuple[str, str], ...] = ()
    token: str = ""

    def __repr__(self) -> str:
        return f"CivitaiReference({self.shown!r})"

    @property
    def is_moving(self) -> bool:
        return self.version == 0

    @property
    def canonical(self) -> str:
        what = f"version/{self.version}" if self.version else f"model/{self.model}"
        return f"civitai:{what}?{encode_query(sorted(self.options))}".rstrip("?")

    @property
    def shown(self) -> str:
        if self.version:
            return f"https://civitai.com/api/download/models/{self.version}"
        return f"https://civitai.com/models/{self.model}"

    @property
    def file_name(self) -> str:
        return hashed_name(self.canonical, "")

    def locate(self, settings: Settings, budget: Budget) -> Location:
        """The version's download address, with the token for Civitai only; raises FetchError subclasses."""
        version = self.version or _newest_version(self, settings, budget)
        query = f"?{encode_query(self.options)}" if self.options else ""
        target = _target(f"/api/download/models/{version}{query}", self, settings)
        return Location(target, identity=f"version:{version}")


def parse(text: str, settings: Settings, kind: Kind) -> CivitaiReference | None:
    """A Civitai link, `civitai:ID@VERSION` or AIR urn; None for anything else. Raises BadReference."""
    if re.match(r"(?i)https?:", text):
        return _parse_url(text, settings)
    if not re.match(r"(?i)(civitai|urn:air):", text):
        return None
    found = _FORM.fullmatch(text)
    if found is None:
        raise BadReference(
            f"the {kind.name} reference {mask(text)} is not a civitai:ID@VERSION or an AIR urn of Civitai"
        )
    version = int(found["version"] or 0)
    return CivitaiReference(version, 0 if version else int(found["model"]))


def _parse_url(text: str, settings: Settings) -> CivitaiReference | None:
    _, host, _ = split_http_url(text)
    parts, endpoint = urlsplit(text), urlsplit(settings.civitai_endpoint)
    if host not in _HOSTS:
        if parts.netloc.lower() != endpoint.netloc.lower():
            return None
        # What holds for Civitai's links holds for those of its stand-in.
        parts = parts._replace(netloc="civitai.com", path=parts.path.removeprefix(endpoint.path.rstrip("/")))
    query = dict(parse_qsl(parts.query))
    download = re.fullmatch(rf"/api/download/models/({_ID})/?", parts.path)
    if download:
        return CivitaiReference(int(download[1]), options=tuple(naming_query(parts)), token=query.get("token", ""))
    page = re.match(rf"/models/({_ID})(?:/|$)", parts.path)
    if page is None:
        raise BadReference(f"the URL {mask(text)} is neither a model page nor a download link of Civitai")
    version = query.get("modelVersionId", "0")
    if not re.fullmatch(_ID, version):
        raise BadReference(f"the URL {mask(text)} has a modelVersionId that is not a number")
    return CivitaiReference(int(version), int(page[1]) if int(version) == 0 else 0)


def _newest_version(reference: CivitaiReference, settings: Settings, budget: Budget) -> int:
    """The model's first listed version, which is the newest (https://developer.civitai.com, GET /api/v1/models/:id)."""
    target = _target(f"/api/v1/models/{reference.model}", reference, settings)
    answer = fetch_bytes(target, max_bytes=MAX_ANSWER, budget=budget)
    try:
        versions = json.loads(answer)["modelVersions"]
        return int(versions[0]["id"])
    except IndexError:
        raise NotFound(f"{reference.shown} has no published version") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise FetchFailed(f"Civitai's answer about {reference.shown} cannot be read") from None


def _target(path: str, reference: CivitaiReference, settings: Settings) -> Target:
    endpoint = settings.civitai_endpoint.rstrip("/")
    token = reference.token or settings.civitai_api_token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # Only a stand-in that the operator chose may be in a private network.
    trusted = "" if urlsplit(endpoint).hostname in _HOSTS else endpoint
    return Target(endpoint + path, headers, trusted, login_path="/login", auth_hint=AUTH_HINT)
