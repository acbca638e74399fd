"""The cache folder on disk: unfinished files, what dead workers left behind, and how a file becomes part of it.

<folder>/<name>.safetensors         the file; appears by one atomic rename
<folder>/<name>.safetensors.json    its sidecar; its modification time is when the file was last used
<folder>/<other>.safetensors        a link to a file beside it: another name that requests gave it
<folder>/.partial/                  files that are being written, named after their writer
<folder>/.locks/                    locks, which only save bandwidth
<folder>/.quarantine/               files that turned out to be damaged
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sdxl_worker.assets.owner import is_left_over, owner_tag
from sdxl_worker.assets.sidecar import SUFFIX, sidecar_path
from sdxl_worker.errors import CacheWriteError

logger = logging.getLogger(__name__)

PARTIAL, LOCKS, QUARANTINE = ".partial", ".locks", ".quarantine"


def make_folder(folder: Path) -> None:
    """Create `folder` where its links lead: /models points to a folder of the volume that nobody has created yet."""
    os.makedirs(os.path.realpath(folder), exist_ok=True)


@contextlib.contextmanager
def temporary_file(folder: Path, final_name: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new unbuffered file on the volume of `folder`, removed at the end unless it was renamed; CacheWriteError."""
    path = folder / PARTIAL / f"{final_name}.{owner_tag()}~{secrets.token_hex(4)}.part"
    try:
        make_folder(path.parent)
        handle = path.open("xb", buffering=0)
    except OSError as error:
        raise not_written(error) from error
    try:
        with handle:
            yield path, handle
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def not_written(error: OSError) -> CacheWriteError:
    """What the caller is told when the cache folder cannot take a file."""
    return CacheWriteError(f"the cache folder cannot be written ({error.strerror or 'I/O error'})")


def quarantine(path: Path) -> None:
    """Take a damaged file out of the cache, and keep it for whoever wants to know why; it stays where it cannot."""
    logger.warning("%s is damaged; it is moved to %s", path.name, QUARANTINE)
    target = path.parent / QUARANTINE / path.name
    with contextlib.suppress(OSError):
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for leftover in (path, sidecar_path(path)):
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)


def prepare_folder(folder: Path, *, download_timeout: float) -> None:
    """Create the cache folder and remove what dead workers left behind; a read-only volume is only logged.

    Called when the worker starts. `download_timeout` (seconds) tells how old another worker's file has to be.
    """
    try:
        make_folder(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        logger.warning("the cache folder %s cannot be created (%s); files go to temporary space", folder, reason)
        return
    for partial in _entries(folder / PARTIAL):
        if is_left_over(partial, older_than_s=download_timeout + 60):
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
                logger.info("removed %s, which an earlier worker left behind", partial.name)
    for lock in _entries(folder / LOCKS):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > 86400:
                lock.unlink(missing_ok=True)
    _remove_orphans(folder)


def _remove_orphans(folder: Path) -> None:
    """Sidecars and names whose file is gone, found with one listing: a volume may hold thousands."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return
    for name in names:
        path = folder / name
        is_orphan = name.endswith(f".safetensors{SUFFIX}") and name.removesuffix(SUFFIX) not in names
        # Not a fresh one, whose file another worker may have renamed since the listing.
        if is_orphan and is_left_over(path, older_than_s=60):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []
