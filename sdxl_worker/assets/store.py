"""References to checked local files, for every kind of asset: one cache, one fetch, one table of sources."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sdxl_worker.assets import other_names, parallel
from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.cache import Cache, Entry
from sdxl_worker.assets.eviction import empty_quarantine, evict
from sdxl_worker.assets.fetch import Progress, fetch_bytes
from sdxl_worker.assets.folder import prepare_folder
from sdxl_worker.assets.inspection import file_sha256, max_download_bytes
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.local_files import open_local_file
from sdxl_worker.assets.order import Order
from sdxl_worker.assets.references import Reference, RemoteReference
from sdxl_worker.assets.remote_files import RemoteFiles
from sdxl_worker.assets.sidecar import read_sidecar
from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.assets.sources.local import CachedReference
from sdxl_worker.errors import WorkerError, about
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]


class AssetStore:
    """Gives local files for references; one per process, since it knows which files are in use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._cache = Cache()
        self._remote_files = RemoteFiles()

    def path_of(self, reference: str, kind: Kind) -> Path:
        """Where the cache keeps the file of `reference`, there or not; no network. Raises BadReference."""
        with kind.own_codes():
            return kind.folder_in(self.settings) / parse_reference(reference, self.settings, kind).file_name

    def get(
        self,
        reference: str,
        kind: Kind,
        on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> AssetFile:
        """The checked local file of `reference`, from the cache or downloaded into it.

        `on_progress(bytes_done, total or None)` is called at most a few times a second; `should_stop()` is asked at
        every chunk and every wait. Raises FetchError and AssetFileError with the kind's codes, and Cancelled.
        """
        with kind.own_codes(), about(reference):
            parsed = parse_reference(reference, self.settings, kind)
            budget = Budget.start(kind.timeout_s(self.settings), should_stop)
            budget.check()
            order = Order(kind, self.settings, self._cache, budget, on_progress)
            entry, cached = self._open(parsed, order)
            if not kind.knows(entry.sidecar.format):
                kind.check(entry.path)
        return _asset_file(entry, parsed, cached=cached)

    def _open(self, reference: Reference, order: Order) -> tuple[Entry, bool]:
        if isinstance(reference, CachedReference):
            return open_local_file(reference, order), True
        assert isinstance(reference, RemoteReference)
        return self._remote_files.open(reference, order)

    def get_all(
        self,
        references: Sequence[str],
        kind: Kind,
        on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[AssetFile]:
        """`get` for several references at once, in order; `on_progress` gets the sums.

        The first error is raised and stops the other downloads.
        """
        return parallel.get_all(references, functools.partial(self.get, kind=kind), on_progress, should_stop)

    def read(self, reference: str, kind: Kind, should_stop: ShouldStop | None = None) -> bytes:
        """The bytes of `reference`, for a kind that is kept nowhere; raises FetchError with its codes, Cancelled."""
        with kind.own_codes():
            parsed = parse_reference(reference, self.settings, kind)
            assert isinstance(parsed, RemoteReference)
            budget = Budget.start(kind.timeout_s(self.settings), should_stop)
            target = parsed.locate(self.settings, budget).target
            return fetch_bytes(target, max_bytes=max_download_bytes(kind, self.settings), budget=budget)

    def preload(self, references: Sequence[str], kind: Kind) -> list[AssetFile]:
        """The files of `references`; one that fails, for whatever reason, is logged with its code and left out."""

        def log(error: Exception) -> None:
            if isinstance(error, WorkerError):
                logger.error("preload: %s: %s", error.code, error)
            else:
                logger.error("preload: one %s failed", kind.name, exc_info=error)

        return parallel.get_what_works(references, lambda reference: self.get(reference, kind), log)

    def keep_as(self, file: AssetFile, name: str, kind: Kind) -> str:
        """Give a file another name inside its folder, by which a request may ask for it; gives that name.

        A name that requests gave to another file before now leads to this one. Raises BadReference for a name that
        cannot be a file's or belongs to a file of its own, CacheWriteError.
        """
        with kind.own_codes():
            return other_names.add(file.path, name, kind.folder_in(self.settings), kind)

    def prepare(self, kind: Kind) -> None:
        """Create the kind's folder and remove what dead workers left behind. Called when the worker starts."""
        folder = kind.folder_in(self.settings)
        prepare_folder(folder, download_timeout=kind.timeout_s(self.settings))
        other_names.remove_dangling(folder)

    def prune(self, kind: Kind) -> list[Path]:
        """Evict down to the kind's limit and empty the quarantine; gives what was removed."""
        folder = kind.folder_in(self.settings)
        return [*evict(folder, kind.cache_limit(self.settings), self._cache), *empty_quarantine(folder)]

    @contextlib.contextmanager
    def in_use(self, files: Sequence[AssetFile]) -> Iterator[None]:
        """Keep this worker from evicting `files` for as long as a job needs them."""
        with self._cache.in_use([file.path for file in files]):
            yield

    def set_aside_if_damaged(self, file: AssetFile) -> bool:
        """True for a file of ours whose bytes are not those that passed the checks: it is in quarantine then.

        One that was put there by hand is not ours.
        """
        sidecar = read_sidecar(file.path)
        try:
            damaged = sidecar is not None and not sidecar[0].by_hand and file_sha256(file.path) != file.sha256
        except OSError:
            damaged = True
        if damaged:
            self._cache.set_aside(file.path)
        return damaged


def _asset_file(entry: Entry, reference: Reference, *, cached: bool) -> AssetFile:
    known = entry.sidecar
    return AssetFile(
        entry.path,
        entry.path.name,
        reference.shown,
        known.sha256,
        known.size,
        cached,
        known.source_sha256 or known.sha256,
        str(known.facts.get("autov3", "")),
        known.reference,
    )
