"""Keep a cache folder below its limit, and tell an operator what is in it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from sdxl_worker.assets.cache import Cache
from sdxl_worker.assets.folder import QUARANTINE, quarantine
from sdxl_worker.assets.inspection import file_sha256
from sdxl_worker.assets.other_names import is_other_name
from sdxl_worker.assets.references import WEIGHT_SUFFIXES
from sdxl_worker.assets.sidecar import Sidecar, read_sidecar, sidecar_path

logger = logging.getLogger(__name__)

# A file used this recently, by whatever worker, may be about to be read: the cache rather stands above its limit.
GRACE_S = 60.0


@dataclass(frozen=True)
class Listed:
    """One cached file; `used_at` in seconds since 1970, `sidecar` None for a file nobody has asked for yet."""

    path: Path
    size: int
    used_at: float
    sidecar: Sidecar | None

    @property
    def by_hand(self) -> bool:
        return self.sidecar is None or self.sidecar.by_hand


def list_cache(folder: Path) -> list[Listed]:
    """Every file in the cache, the most recently used first; one that vanishes meanwhile is left out, and so are the
    other names that requests gave them."""
    try:
        paths = [folder / name for name in os.listdir(folder)]
    except OSError:
        return []
    found = []
    for path in paths:
        if path.suffix not in WEIGHT_SUFFIXES or is_other_name(path):
            continue
        with contextlib.suppress(OSError):
            found_file = path.stat()
            if not stat.S_ISREG(found_file.st_mode):
                continue
            read = read_sidecar(path)
            sidecar = read[0] if read is not None else None
            found.append(Listed(path, found_file.st_size, _used_at(read, found_file.st_mtime), sidecar))
    return sorted(found, key=lambda item: item.used_at, reverse=True)


def evict(folder: Path, limit: float, cache: Cache) -> list[Path]:
    """Remove least recently used files until `folder` holds at most `limit` bytes (0 = no limit); gives what went.

    What a job of this worker holds, and what anyone used within GRACE_S, stays. Files put there by hand are neither
    removed nor counted. Other workers may do the same at the same time: a file that is gone already is not an error.
    """
    if limit <= 0:
        return []
    own = [item for item in list_cache(folder) if not item.by_hand]
    total, removed = sum(item.size for item in own), []
    for item in reversed(own):
        if total <= limit:
            break
        if cache.is_held(item.path) or time.time() - _last_use(item) < GRACE_S:
            continue
        with contextlib.suppress(OSError):
            item.path.unlink(missing_ok=True)
            sidecar_path(item.path).unlink(missing_ok=True)
            logger.info("evicted %s (%.0f MB)", item.path.name, item.size / 1e6)
            removed.append(item.path)
            total -= item.size
    return removed


def _used_at(read: tuple[Sidecar, float] | None, otherwise: float) -> float:
    """When a file was last used (seconds since 1970). A clock that was wrong does not make it used for ever."""
    latest = time.time() + GRACE_S
    return next((when for when in (read[1] if read is not None else latest, otherwise) if when < latest), 0.0)


def _last_use(item: Listed) -> float:
    """Asked again right before the removal: another worker may have used the file since the listing."""
    return _used_at(read_sidecar(item.path), item.used_at)


def empty_quarantine(folder: Path) -> list[Path]:
    """Remove what was put into quarantine; gives what was removed."""
    try:
        paths = list((folder / QUARANTINE).iterdir())
    except OSError:
        return []
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return [path for path in paths if not os.path.lexists(path)]


def verify(folder: Path) -> list[tuple[Listed, str]]:
    """Compare every file with its recorded sha256.

    Gives (file, "ok" | "unchecked" | "quarantined" | "changed" | "vanished" | "unreadable") for each.
    """
    return [(item, _verdict(item)) for item in list_cache(folder)]


def _verdict(item: Listed) -> str:
    if item.sidecar is None:
        return "unchecked"
    try:
        sha256 = file_sha256(item.path)
    except FileNotFoundError:
        return "vanished"  # evicted meanwhile
    except OSError:
        return "unreadable"
    if sha256 == item.sidecar.sha256:
        return "ok"
    if item.by_hand:
        return "changed"
    quarantine(item.path)
    return "quarantined"
