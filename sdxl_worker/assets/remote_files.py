"""Files on other hosts: the cache first, then one download, published whole or not at all."""

from __future__ import annotations

import functools
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

from sdxl_worker.assets.cache import Entry
from sdxl_worker.assets.eviction import evict
from sdxl_worker.assets.fetch import fetch_bytes, fetch_to
from sdxl_worker.assets.folder import temporary_file
from sdxl_worker.assets.inspection import (
    add_metadata,
    file_sha256,
    is_pickle,
    max_download_bytes,
    pickle_to_safetensors,
)
from sdxl_worker.assets.location import Location
from sdxl_worker.assets.locks import turn_to_download
from sdxl_worker.assets.order import Order
from sdxl_worker.assets.references import RemoteReference
from sdxl_worker.assets.sidecar import Sidecar, fields_from, read_sidecar
from sdxl_worker.assets.temporary_space import temporary_space, temporary_space_path
from sdxl_worker.errors import (
    AssetFileError,
    BadFile,
    CacheWriteError,
    FetchFailed,
    FetchIncomplete,
    FetchTimeout,
)

logger = logging.getLogger(__name__)

# A branch, a tag or "the newest version" is asked for again this many seconds after it was last looked up ...
RECHECK_S = 600.0
# ... and after this many when the host could not be reached.
RETRY_UNREACHABLE_S = 60.0
# How much temporary space files of a kind without a limit may take when their folder cannot be written.
TEMPORARY_SPACE_BYTES = 8e9
MAX_BESIDE = 256 * 1024

_UNREACHABLE = (FetchFailed, FetchTimeout, FetchIncomplete)


class RemoteFiles:
    """Opens references to other hosts, and remembers for a while which of them could not be reached."""

    def __init__(self) -> None:
        self._unreachable_since: dict[str, float] = {}

    def open(self, reference: RemoteReference, order: Order) -> tuple[Entry, bool]:
        """The checked file of `reference`, and whether it was there already; raises FetchError, AssetFileError."""
        path = order.folder / reference.file_name
        entry = self._fresh_entry(reference, path, order)
        if entry is not None:
            return entry, True
        with turn_to_download(path, order.budget, lambda: self._fresh_entry(reference, path, order) is not None):
            entry, cached = self._refreshed_entry(reference, path, order)
        if not cached:
            evict(order.folder, order.kind.cache_limit(order.settings), order.cache)
        return entry, cached

    def _fresh_entry(self, reference: RemoteReference, path: Path, order: Order) -> Entry | None:
        """What the cache answers by itself, without a lock and without the network."""
        entry = _known_entry(reference, path, order)
        if entry is None or not _follows(reference, order):
            return entry
        retried_at = self._unreachable_since.get(reference.key, 0.0) + RETRY_UNREACHABLE_S - RECHECK_S
        checked_at = max(entry.sidecar.checked_at, retried_at)
        return entry if 0 <= time.time() - checked_at < RECHECK_S else None

    def _refreshed_entry(self, reference: RemoteReference, path: Path, order: Order) -> tuple[Entry, bool]:
        """(entry, whether it was there): look again now that it is our turn, ask for a newer file, download it."""
        entry = self._fresh_entry(reference, path, order)
        if entry is not None:
            return entry, True
        old = _known_entry(reference, path, order) or _adopted(reference, path, order)
        if old is not None and not _follows(reference, order):
            return old, True
        try:
            location = reference.locate(order.settings, order.budget)
            if old is not None and location.identity == old.sidecar.identity:
                return order.cache.write_sidecar(old.path, replace(old.sidecar, checked_at=time.time())), True
            return _download(reference, location, order), False
        except _UNREACHABLE as error:
            if old is None:
                raise
            logger.warning("%s; using the cached file", error)
            self._unreachable_since[reference.key] = time.time()
            return old, True


def _known_entry(reference: RemoteReference, path: Path, order: Order) -> Entry | None:
    """What is in the cache folder, or in temporary space; of two states of a moving reference the later one."""
    look_up = functools.partial(order.cache.look_up, key=reference.key, any_time=order.kind.is_operators)
    entry = look_up(path)
    if entry is not None and not _follows(reference, order):
        return entry
    aside = look_up(temporary_space_path(order.kind) / path.name)
    return max(filter(None, (entry, aside)), key=lambda known: known.sidecar.checked_at, default=None)


def _follows(reference: RemoteReference, order: Order) -> bool:
    return reference.is_moving and not order.kind.is_operators


def _adopted(reference: RemoteReference, path: Path, order: Order) -> Entry | None:
    """A file whose sidecar is missing or out of step: taken when its bytes are good, else put into quarantine.

    That is how a worker leaves it that died between rename and sidecar, or a volume that was copied.
    """
    if not os.path.isfile(path) or os.path.islink(path):
        return None
    read = read_sidecar(path)
    known = read[0] if read is not None and read[0].key == reference.key else None
    if read is not None and known is None:
        return None  # another reference with the same short hash: this one replaces it
    try:
        found, sha256 = path.stat(), file_sha256(path)
    except OSError:  # evicted meanwhile, or not readable
        return None
    if known is not None and known.sha256 == sha256:
        return order.cache.write_sidecar(path, replace(known, size=found.st_size, mtime_ns=found.st_mtime_ns))
    try:
        if known is not None:
            raise FetchIncomplete(f"{path.name} is not what was downloaded")
        facts = order.kind.check(path)
    except (AssetFileError, FetchIncomplete):
        order.cache.set_aside(path)
        return None
    sidecar = Sidecar(reference.shown, found.st_size, found.st_mtime_ns, sha256, reference.key, **fields_from(facts))
    return order.cache.write_sidecar(path, sidecar)


def _download(reference: RemoteReference, location: Location, order: Order) -> Entry:
    """Into the cache folder, or into temporary space of this worker when the folder cannot take the file."""
    try:
        return _download_into(order.folder, reference, location, order)
    except CacheWriteError as error:
        logger.warning("%s; using local temporary space for %s", error, reference.shown)
    folder = temporary_space(order.kind)
    evict(folder, order.kind.cache_limit(order.settings) or TEMPORARY_SPACE_BYTES, order.cache)
    try:
        return _download_into(folder, reference, location, order)
    except CacheWriteError as error:
        message = f"neither the {order.kind.name} cache nor local temporary space can take the file"
        raise CacheWriteError(message) from error


def _download_into(folder: Path, reference: RemoteReference, location: Location, order: Order) -> Entry:
    path = folder / reference.file_name
    with temporary_file(folder, path.name) as (temporary, handle):
        limit = max_download_bytes(order.kind, order.settings)
        fetched = fetch_to(handle, location.target, max_bytes=limit, budget=order.budget, on_progress=order.on_progress)
        if location.sha256 and location.sha256 != fetched.sha256:
            raise FetchFailed(f"{reference.shown} arrived damaged: its sha256 is not the announced one")
        sidecar = Sidecar(
            reference.shown,
            fetched.size,
            0,
            fetched.sha256,
            reference.key,
            identity=location.identity,
            checked_at=time.time(),
            source_sha256=fetched.sha256,
        )
        if order.kind.takes_pickles and (is_pickle(temporary) or location.beside):
            return _publish_rewritten(temporary, path, sidecar, location, order)
        return order.cache.publish(temporary, path, replace(sidecar, **fields_from(order.kind.check(temporary))))


def _publish_rewritten(source: Path, path: Path, sidecar: Sidecar, location: Location, order: Order) -> Entry:
    """A pickle as safetensors, a PEFT adapter with its settings: what is published then has a sha256 of its own."""
    with temporary_file(path.parent, path.name) as (converted, _), temporary_file(path.parent, path.name) as (final, _):
        was_pickle = is_pickle(source)
        if was_pickle:
            if location.suffix == ".safetensors":
                raise BadFile("the file is a pickle under the name of a .safetensors file")
            pickle_to_safetensors(source, converted, order.budget)
            source = converted
        metadata = {
            name: fetch_bytes(target, max_bytes=MAX_BESIDE, budget=order.budget).decode("utf-8", "replace")
            for name, target in location.beside.items()
        }
        add_metadata(source, final, metadata)
        facts = dict(order.kind.check(final))
        if was_pickle:
            # Others know a pickle by the hash of the whole file.
            facts["autov3"] = sidecar.source_sha256[:12]
        return order.cache.publish(final, path, replace(sidecar, sha256=file_sha256(final), **fields_from(facts)))
