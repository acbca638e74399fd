"""Find the VAE and the previews' VAE on this machine, and download them when they are not there."""

from pathlib import Path

from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.assets.sources.hub import HubReference
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import FetchError, ModelUnavailable
from sdxl_worker.generate.checkpoint import find_weights
from sdxl_worker.generate.model_repo import RUNPOD_CACHE, OnProgress, Wanted, find_repo
from sdxl_worker.kinds import VAE
from sdxl_worker.settings import Settings

_VAE = Wanted("VAE_ID", "config.json")
_PREVIEW_VAE = Wanted("PREVIEW_VAE_ID", "config.json")


def find_vae(settings: Settings, *, runpod_cache: Path = RUNPOD_CACHE, on_progress: OnProgress = None) -> Path | None:
    """The folder or .safetensors file of VAE_ID's VAE, found or downloaded like a base model; None when it is empty.

    Raises ModelUnavailable.
    """
    return _find_part(settings.vae_id, _VAE, settings, runpod_cache, on_progress)


def find_preview_vae(
    settings: Settings, *, runpod_cache: Path = RUNPOD_CACHE, on_progress: OnProgress = None
) -> Path | None:
    """PREVIEW_VAE_ID, found or downloaded like VAE_ID."""
    return _find_part(settings.preview_vae_id, _PREVIEW_VAE, settings, runpod_cache, on_progress)


def _find_part(
    part_id: str, wanted: Wanted, settings: Settings, runpod_cache: Path, on_progress: OnProgress
) -> Path | None:
    if not part_id:
        return None
    local = Path(part_id).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".safetensors"):
        return local
    try:
        reference = parse_reference(part_id, settings, VAE)
    except FetchError:
        raise ModelUnavailable(
            f"{wanted.variable} is neither a Hub repo id, an existing folder or .safetensors file nor a URL; "
            "set it, or set it to empty"
        ) from None
    if isinstance(reference, HubReference) and not reference.path:
        return find_repo(reference, wanted, settings, runpod_cache, on_progress)
    return find_weights(part_id, VAE, wanted.variable, AssetStore(settings), on_progress)
