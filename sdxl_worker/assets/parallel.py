"""Several references at once: one request's, or those made ready before the first job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.fetch import PROGRESS_INTERVAL_S, Progress

MAX_PARALLEL = 4


class _Sum:
    """Adds up the progress of several downloads; the total is None until every download that runs knows its own."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress = on_progress
        self._parts: dict[int, tuple[int, int | None]] = {}
        self._lock = threading.Lock()
        self._reported_at = 0.0

    def part(self, index: int) -> Progress | None:
        if self._on_progress is None:
            return None
        return lambda done, total: self._report(index, done, total)

    def _report(self, index: int, done: int, total: int | None) -> None:
        with self._lock:
            self._parts[index] = (done, total)
            now = time.monotonic()
            if self._on_progress is None or (done != total and now - self._reported_at < PROGRESS_INTERVAL_S):
                return
            self._reported_at = now
            totals = [part[1] for part in self._parts.values()]
            known = [total for total in totals if total is not None]
            whole = sum(known) if len(known) == len(totals) else None
            self._on_progress(sum(part[0] for part in self._parts.values()), whole)


def get_all(
    references: Sequence[str],
    get: Callable[..., AssetFile],
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[AssetFile]:
    """One AssetFile per reference, in order, got at most MAX_PARALLEL at a time and equal references once.

    `get` takes a reference, `on_progress` and `should_stop`. `on_progress` gets the sums over all downloads, from one
    thread at a time. The first error wins and stops the rest.
    """
    unique = list(dict.fromkeys(references))
    failed = threading.Event()
    progress = _Sum(on_progress)

    def stopped() -> bool:
        return failed.is_set() or (should_stop is not None and should_stop())

    def get_one(index: int) -> AssetFile:
        return get(unique[index], on_progress=progress.part(index), should_stop=stopped)

    if len(unique) == 1:
        found = {unique[0]: get_one(0)}
    else:
        with ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="asset") as pool:
            futures = [pool.submit(get_one, index) for index in range(len(unique))]
            _raise_first(futures, failed)
            found = dict(zip(unique, (future.result() for future in futures), strict=True))
    return [found[reference] for reference in references]


def _raise_first(futures: list[Future[AssetFile]], failed: threading.Event) -> None:
    for future in as_completed(futures):
        if (error := future.exception()) is not None:
            failed.set()
            raise error


def get_what_works(
    references: Sequence[str], get: Callable[[str], AssetFile], on_failure: Callable[[Exception], None]
) -> list[AssetFile]:
    """What `get` gives for each reference, at most MAX_PARALLEL at a time; one that fails is reported and left out."""

    def get_or_report(reference: str) -> AssetFile | None:
        try:
            return get(reference)
        except Exception as error:
            on_failure(error)
        return None

    if not references:
        return []
    with ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="preload") as pool:
        return [file for file in pool.map(get_or_report, references) if file is not None]
