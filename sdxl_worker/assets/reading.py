"""A request's files fetched and read, and once more where the cache had let one go or one was damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, NotFound, about
from sdxl_worker.job_run import JobRun

T = TypeVar("T")


class _StaleCache(NotFound):
    """A cached file was gone or damaged when it was read."""


def fetch_and_read(
    references: Sequence[str],
    kind: Kind,
    assets: AssetStore,
    run: JobRun,
    read: Callable[[AssetFile], T],
    stage: str,
) -> tuple[list[AssetFile], list[T]]:
    """The file of each reference and what `read` makes of it, in order; `stage` is the progress report's word for that.

    Raises FetchError, AssetFileError with the kind's codes, and Cancelled; `error.reference` says which one it was.
    """
    try:
        return _once(references, kind, assets, run, read, stage)
    except _StaleCache:
        # Evicted or damaged between the look into the cache and the reading: once more, from its source.
        return _once(references, kind, assets, run, read, stage)


def _once(
    references: Sequence[str],
    kind: Kind,
    assets: AssetStore,
    run: JobRun,
    read: Callable[[AssetFile], T],
    stage: str,
) -> tuple[list[AssetFile], list[T]]:
    with run.stage("downloading"):
        files = assets.get_all(references, kind, run.report_bytes, run.should_stop)
    with run.stage(stage), assets.in_use(files), kind.own_codes():
        found = []
        for reference, file in zip(references, files, strict=True):
            run.check_stop()
            with about(reference):
                found.append(_read(read, file, assets))
    return files, found


def _read(read: Callable[[AssetFile], T], file: AssetFile, assets: AssetStore) -> T:
    try:
        return read(file)
    except FileNotFoundError as error:
        raise _StaleCache(f"{file.reference} vanished from the cache") from error
    except AssetFileError as error:
        if assets.set_aside_if_damaged(file):
            raise _StaleCache(f"{file.reference} was damaged in the cache") from error
        raise
