"""A base model in one .safetensors file, downloaded once from a URL that the operator named."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.cache import temporary_file
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import Progress, fetch_to
from sdxl_worker.assets.located import Located
from sdxl_worker.assets.references import CivitaiReference, HubReference, Reference, UrlReference
from sdxl_worker.assets.sources import civitai, hub
from sdxl_worker.errors import FetchError, ModelUnavailable
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

TIMEOUT_S = 3 * 3600.0
MAX_BYTES = 64 << 30
MAX_HEADER = 100 << 20


def checkpoint_folder() -> Path:
    """Beside the Hub's cache, since the image carries both along."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "checkpoints"


def find_checkpoint(reference: Reference, settings: Settings, on_progress: Progress | None = None) -> Path:
    """The local file of a checkpoint URL, under its hash-keyed name; raises ModelUnavailable."""
    path = checkpoint_folder() / reference.file_name
    if path.is_file():
        return path
    try:
        located = _locate(reference, settings, Budget.start(TIMEOUT_S))
        with temporary_file(path.parent, path.name) as (temporary, handle):
            fetch_to(
                handle, located.target, max_bytes=MAX_BYTES, budget=Budget.start(TIMEOUT_S), on_progress=on_progress
            )
            if not is_safetensors(temporary):
                raise ModelUnavailable(f"{reference.shown} is not a .safetensors checkpoint; check MODEL_ID")
            os.fsync(handle.fileno())
            os.replace(temporary, path)
    except FetchError as error:
        raise ModelUnavailable(f"the base model cannot be downloaded: {error}; check MODEL_ID") from None
    except OSError as error:
        raise ModelUnavailable(f"the base model cannot be stored ({error.strerror}); make room on the disk") from None
    return path


def _locate(reference: Reference, settings: Settings, budget: Budget) -> Located:
    if isinstance(reference, HubReference):
        return hub.locate(reference, settings, budget)
    if isinstance(reference, CivitaiReference):
        return civitai.locate(reference, settings, budget)
    assert isinstance(reference, UrlReference)
    # The operator named it, not a request: it may be a host of their own network.
    return Located(Target(reference.url, trusted_origin=reference.url))


def is_safetensors(path: Path) -> bool:
    """True when the file's header is whole and its tensors fill exactly the rest (huggingface/safetensors, Format)."""
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= MAX_HEADER:
                return False
            header: dict[str, Any] = json.loads(handle.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return bool(ends) and 8 + length + max(ends) == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
