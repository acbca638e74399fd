"""Files that an operator put into the cache folder: checked, and pickles converted, when first asked for."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from sdxl_worker.assets.cache import Cache, Entry
from sdxl_worker.assets.folder import not_written, temporary_file
from sdxl_worker.assets.inspection import check_size, file_sha256, is_pickle, pickle_to_safetensors
from sdxl_worker.assets.order import Order
from sdxl_worker.assets.sidecar import Sidecar, fields_from, read_sidecar
from sdxl_worker.assets.sources import local
from sdxl_worker.assets.sources.local import CachedReference
from sdxl_worker.assets.temporary_space import temporary_space
from sdxl_worker.errors import BadFile, CacheWriteError, NotFound

logger = logging.getLogger(__name__)


def open_local_file(reference: CachedReference, order: Order) -> Entry:
    """The checked safetensors file for a name inside the cache folder, without any network call.

    Raises BadReference for a link out of the folder, NotFound, Ambiguous, TooLarge, WrongFile and BadFile.
    """
    found = local.find(reference, order.folder, order.kind)
    try:
        if found.name.endswith(".safetensors"):
            return _checked_entry(order.folder / found.name, order)
        return _converted_entry(found, order)
    except FileNotFoundError:
        raise NotFound(f"{found.name} vanished from the {order.kind.name} cache") from None
    except OSError as error:
        raise BadFile(f"{found.name} cannot be read ({error.strerror or type(error).__name__})") from error


def _checked_entry(path: Path, order: Order) -> Entry:
    """A .safetensors file as it lies there; a file that a worker fetched before is known already."""
    entry = _known_entry(path, order.cache)
    if entry is not None:
        return entry
    with order.cache.check_turn:
        entry = _known_entry(path, order.cache)
        if entry is not None:
            return entry
        check_size(path, order.kind, order.settings)
        if is_pickle(path):
            raise BadFile("the file is a pickle under the name of a .safetensors file")
        found, facts = path.stat(), order.kind.check(path)
        sidecar = Sidecar(path.name, found.st_size, found.st_mtime_ns, file_sha256(path), **fields_from(facts))
        return order.cache.write_sidecar(path, sidecar)


def _known_entry(path: Path, cache: Cache) -> Entry | None:
    read = read_sidecar(path)
    return cache.look_up(path, read[0].key if read is not None else "")


def _converted_entry(reference: CachedReference, order: Order) -> Entry:
    try:
        return _converted_in(order.folder, reference, order)
    except CacheWriteError as error:
        logger.warning("%s; using temporary space for the converted %s", error, reference.name)
    return _converted_in(temporary_space(order.kind), reference, order)


def _converted_in(folder: Path, reference: CachedReference, order: Order) -> Entry:
    """The safetensors copy, in `folder`, of a .pt or .bin; made anew when that has changed."""
    source, path = order.folder / reference.name, folder / reference.file_name
    found = source.stat()
    entry = order.cache.look_up(path, reference.key)
    if entry is not None and _is_from(entry.sidecar, found):
        return entry
    check_size(source, order.kind, order.settings)
    with temporary_file(folder, path.name) as (temporary, _handle):
        was_pickle, source_sha256 = is_pickle(source), file_sha256(source)
        if was_pickle:
            pickle_to_safetensors(source, temporary, order.budget)
        else:
            # Somebody renamed a safetensors file; its content is what counts.
            try:
                shutil.copyfile(source, temporary)
            except OSError as error:
                raise not_written(error) from error
        facts = dict(order.kind.check(temporary))
        if was_pickle:
            facts["autov3"] = source_sha256[:12]  # as others know it
        sidecar = Sidecar(reference.name, 0, 0, file_sha256(temporary), reference.key, **fields_from(facts))
        sidecar = replace(
            sidecar,
            source_sha256=source_sha256,
            source_size=found.st_size,
            source_mtime_ns=found.st_mtime_ns,
        )
        return order.cache.publish(temporary, path, sidecar)


def _is_from(sidecar: Sidecar, source: os.stat_result) -> bool:
    return (sidecar.source_size, sidecar.source_mtime_ns) == (source.st_size, source.st_mtime_ns)
