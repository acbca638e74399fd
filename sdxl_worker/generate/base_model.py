"""Find the base model and the refiner on this machine, and download them when they are not there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.assets.sources.hub import HubReference
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import FetchError, ModelUnavailable
from sdxl_worker.generate.checkpoint import find_weights
from sdxl_worker.generate.model_repo import (
    BASE_MODEL,
    REFINER,
    RUNPOD_CACHE,
    OnProgress,
    Wanted,
    find_repo,
    snapshot_here,
)
from sdxl_worker.kinds import CHECKPOINT
from sdxl_worker.settings import Settings


@dataclass(frozen=True)
class BaseModel:
    """Where the base model is. `path` is None for "tiny"; `name` is safe to show; `allow_vae_override` says whether
    VAE_ID replaces the model's own VAE."""

    kind: Literal["tiny", "folder", "file"]
    path: Path | None
    name: str
    allow_vae_override: bool

    @property
    def variant(self) -> str | None:
        """`fp16` where the folder holds half-precision weights under that name."""
        return "fp16" if self.path is not None and any(self.path.glob("unet/*.fp16.safetensors")) else None


def find_base_model(
    settings: Settings, *, runpod_cache: Path = RUNPOD_CACHE, on_progress: OnProgress = None
) -> BaseModel:
    """MODEL_ID as tiny, a local folder or file, a repo that is cached or gets downloaded, or a URL of one file.

    Raises ModelUnavailable with one sentence that says what to set or run.
    """
    return _find_model(settings.model_id, BASE_MODEL, settings, runpod_cache, on_progress)


def base_model_here(settings: Settings, *, runpod_cache: Path = RUNPOD_CACHE) -> BaseModel | None:
    """What find_base_model will find, if it is a folder, a file or a Hub repo on this disk, else None; no network."""
    if settings.model_id == "tiny":
        return None
    if not Path(settings.model_id).expanduser().exists():
        try:
            reference = parse_reference(settings.model_id, settings, CHECKPOINT)
        except FetchError:
            return None
        if not isinstance(reference, HubReference) or reference.path:
            return None
        if snapshot_here(reference, BASE_MODEL, runpod_cache) is None:
            return None
    try:
        return find_base_model(settings, runpod_cache=runpod_cache)
    except ModelUnavailable:
        return None


def find_refiner(
    settings: Settings, *, runpod_cache: Path = RUNPOD_CACHE, on_progress: OnProgress = None
) -> BaseModel | None:
    """REFINER_ID, found or downloaded like a base model; None when it is empty. Raises ModelUnavailable."""
    if not settings.refiner_id:
        return None
    return _find_model(settings.refiner_id, REFINER, settings, runpod_cache, on_progress)


def _find_model(
    model_id: str,
    wanted: Wanted,
    settings: Settings,
    runpod_cache: Path,
    on_progress: OnProgress,
) -> BaseModel:
    variable = wanted.variable
    chosen = settings.is_set("vae_id") and bool(settings.vae_id)
    if model_id == "tiny":
        return BaseModel("tiny", None, "tiny", allow_vae_override=False)
    local = Path(model_id).expanduser()
    if local.is_dir():
        if not (local / wanted.index).is_file():
            raise ModelUnavailable(
                f"{variable} is the folder {local.name}, which holds no model_index.json of diffusers"
            )
        return BaseModel("folder", local, local.name, allow_vae_override=chosen)
    if local.is_file():
        if local.suffix != ".safetensors":
            raise ModelUnavailable(f"{variable} is the file {local.name}, which is not a .safetensors checkpoint")
        return BaseModel("file", local, local.name, allow_vae_override=True)
    try:
        reference = parse_reference(model_id, settings, CHECKPOINT)
    except FetchError:
        raise ModelUnavailable(
            f"{variable} is neither a Hub repo id, an existing folder or .safetensors file, a URL nor tiny; "
            f"set {variable}"
        ) from None
    if isinstance(reference, HubReference) and not reference.path:
        path = find_repo(reference, wanted, settings, runpod_cache, on_progress)
        return BaseModel("folder", path, reference.shown, allow_vae_override=True)
    path = find_weights(model_id, CHECKPOINT, variable, AssetStore(settings), on_progress)
    return BaseModel("file", path, reference.shown, allow_vae_override=True)
