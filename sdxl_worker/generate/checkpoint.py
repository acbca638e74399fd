"""Weights in one .safetensors file, downloaded once from a reference that the operator named."""

from pathlib import Path

from sdxl_worker.assets.fetch import Progress
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, FetchError, ModelUnavailable


def find_weights(
    reference: str, kind: Kind, variable: str, assets: AssetStore, on_progress: Progress | None = None
) -> Path:
    """The local copy of a file on another host, under its hash-keyed name; `variable` is where the operator named it.

    Raises ModelUnavailable.
    """
    assets.prepare(kind)
    try:
        return assets.get(reference, kind, on_progress).path
    except AssetFileError as error:
        raise ModelUnavailable(f"{variable} leads to a file that is not a .safetensors {kind.name}: {error}") from None
    except FetchError as error:
        raise ModelUnavailable(f"the {kind.name} of {variable} cannot be downloaded: {error}; check it") from None
