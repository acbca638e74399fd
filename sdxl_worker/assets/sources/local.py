"""Files that an operator put into the cache folder: checked, and pickles converted, when first asked for."""

import logging
import os
import stat
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdxl_worker.assets.cache import (
    Entry,
    Sidecar,
    look_up,
    publish,
    read_sidecar,
    temporary_file,
    write_sidecar,
)
from sdxl_worker.assets.inspection import check_file, check_size, file_sha256, is_pickle, pickle_to_safetensors
from sdxl_worker.assets.references import WEIGHT_SUFFIXES, CachedReference, reference_key
from sdxl_worker.assets.spare import spare_folder
from sdxl_worker.errors import BadReference, CacheWriteError, NotFound
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

_checking = threading.Lock()


def open_by_hand(reference: CachedReference, settings: Settings) -> Entry:
    """The checked safetensors file for a name inside the cache folder, without any network call.

    Raises BadReference for a link out of the folder, NotFound, TooLarge, WrongFile and BadFile.
    """
    folder = settings.lora_cache_dir
    name = _existing_name(reference.name, folder)
    path = folder / name
    if Path(name).suffix == ".safetensors":
        return _checked_entry(path, settings)
    return _converted_entry(CachedReference(name), path, settings)


def _existing_name(name: str, folder: Path) -> str:
    names = [name] if name.endswith(WEIGHT_SUFFIXES) else [name + suffix for suffix in WEIGHT_SUFFIXES]
    for candidate in names:
        try:
            found = os.stat(folder / candidate)
        except FileNotFoundError:
            if not os.path.islink(folder / candidate):
                continue
            raise BadReference(f"{candidate} in the LoRA cache is a link to nowhere") from None
        except OSError:
            continue
        inside = os.path.realpath(folder / candidate).startswith(os.path.realpath(folder) + os.sep)
        if not inside or not stat.S_ISREG(found.st_mode):
            raise BadReference(f"{candidate} in the LoRA cache is no file inside the cache folder")
        return candidate
    raise NotFound(f"the LoRA cache holds no file named {name}")


def _checked_entry(path: Path, settings: Settings) -> Entry:
    """A .safetensors file as it lies there; a file that a worker fetched before is known already."""
    entry = _known_entry(path)
    if entry is not None:
        return entry
    with _checking:  # one at a time: the check takes as much memory as the file
        entry = _known_entry(path)
        if entry is not None:
            return entry
        check_size(path, settings)
        if is_pickle(path):
            pickle_to_safetensors(path, path, ".safetensors")  # refuses
        found, facts = path.stat(), check_file(path)
        sidecar = Sidecar(path.name, found.st_size, found.st_mtime_ns, file_sha256(path), **described(facts))
        return write_sidecar(path, sidecar)


def _known_entry(path: Path) -> Entry | None:
    read = read_sidecar(path)
    return look_up(path, read[0].key if read is not None else "")


def _converted_entry(reference: CachedReference, source: Path, settings: Settings) -> Entry:
    """The safetensors copy of a .pt or .bin, made anew when the source has changed."""
    found, key = source.stat(), reference_key(reference)
    for folder in (settings.lora_cache_dir, None):
        path = (folder or spare_folder()) / reference.file_name
        entry = look_up(path, key)
        if entry is not None and _is_from(entry.sidecar, found):
            return entry
        check_size(source, settings)
        try:
            with temporary_file(path.parent, path.name) as (temporary, _handle):
                was_pickle = is_pickle(source)
                if was_pickle:
                    pickle_to_safetensors(source, temporary, source.suffix)
                else:
                    # Somebody renamed a safetensors file; its content is what counts.
                    temporary.write_bytes(source.read_bytes())
                facts = check_file(temporary)
                if was_pickle:
                    facts["autov3"] = file_sha256(source)[:12]
                sidecar = Sidecar(reference.name, 0, 0, file_sha256(temporary), key=key, **described(facts))
                sidecar = replace(sidecar, source_size=found.st_size, source_mtime_ns=found.st_mtime_ns)
                return publish(temporary, path, sidecar)
        except CacheWriteError:
            if folder is None:
                raise
            logger.warning("the LoRA cache cannot take the converted %s; using temporary space", reference.name)
    raise AssertionError("unreachable")


def _is_from(sidecar: Sidecar, source: os.stat_result) -> bool:
    return (sidecar.source_size, sidecar.source_mtime_ns) == (source.st_size, source.st_mtime_ns)


def described(facts: dict[str, Any]) -> dict[str, Any]:
    """The sidecar fields that a file's facts fill."""
    return {
        "format": str(facts.get("format", "")),
        "base_model": str(facts.get("base_model", "")),
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "facts": facts,
    }
