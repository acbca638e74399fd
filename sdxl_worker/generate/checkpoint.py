"""A base model in one .safetensors file, downloaded once from a URL that the operator named."""

from pathlib import Path

from sdxl_worker.assets.fetch import Progress
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, FetchError, ModelUnavailable
from sdxl_worker.kinds import CHECKPOINT


def find_checkpoint(model_id: str, assets: AssetStore, on_progress: Progress | None = None) -> Path:
    """The local file of a checkpoint on another host, under its hash-keyed name; raises ModelUnavailable."""
    assets.prepare(CHECKPOINT)
    try:
        return assets.get(model_id, CHECKPOINT, on_progress).path
    except AssetFileError as error:
        raise ModelUnavailable(f"MODEL_ID leads to a file that is not a .safetensors checkpoint: {error}") from None
    except FetchError as error:
        raise ModelUnavailable(f"the base model cannot be downloaded: {error}; check MODEL_ID") from None
