"""LoRA reference -> verified local file; and the command line that fills and tends the caches."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sdxl_worker.downloads import resolve_lora
from sdxl_worker.parallel import resolve_loras
from sdxl_worker.references import parse_reference
from sdxl_worker.request import LoraFile
from sdxl_worker.settings import Settings


def get_lora_cache_path(lora_source: str) -> Path:
    """Where the cache keeps the file of this reference, whether it is there or not; no network.

    Raises LoraReferenceError.
    """
    settings = Settings.from_environment()
    return settings.lora_cache_dir / parse_reference(lora_source, settings).file_name


def download_lora(
    lora_source: str,
    on_progress: Callable[[int, int | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    settings: Settings | None = None,
) -> LoraFile:
    """The checked local file for a LoRA reference, from the cache or downloaded into it.

    `on_progress(bytes_done, total or None)` is called at most a few times a second; `should_stop()` is asked at every
    chunk and every wait. Raises LoraDownloadError and LoraFileError subclasses, and Cancelled.
    """
    return resolve_lora(lora_source, settings or Settings.from_environment(), on_progress, should_stop)


def download_loras(
    sources: Sequence[str],
    on_progress: Callable[[int, int | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    settings: Settings | None = None,
) -> list[LoraFile]:
    """`download_lora` for several references at once, in order; `on_progress` gets the sums.

    The first error is raised and stops the other downloads.
    """
    return resolve_loras(sources, settings or Settings.from_environment(), on_progress, should_stop)
