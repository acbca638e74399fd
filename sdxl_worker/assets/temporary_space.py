"""Temporary space of this worker, for files that their cache folder cannot take."""

import os
import stat
import tempfile
from pathlib import Path

from sdxl_worker.assets.kind import Kind
from sdxl_worker.errors import CacheWriteError


def temporary_space_path(kind: Kind) -> Path:
    """Where files of `kind` go when their folder cannot be written; nothing is created."""
    return Path(tempfile.gettempdir()) / f"sdxl-worker-{kind.name.lower().replace(' ', '-')}s-{os.getuid()}"


def temporary_space(kind: Kind) -> Path:
    """This user's own folder in the container's temporary space.

    Raises CacheWriteError when that cannot be had, or belongs to someone else.
    """
    folder = temporary_space_path(kind)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise CacheWriteError(f"neither the {kind.name} cache nor local temporary space can be written") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise CacheWriteError(f"the local temporary folder for {kind.name}s belongs to someone else")
    return folder
