"""Temporary space for LoRAs that the cache folder cannot take."""

import os
import stat
import tempfile
from pathlib import Path

from sdxl_worker.errors import CacheWriteError


def spare_path() -> Path:
    """Where LoRAs go when the cache cannot be written; nothing is created."""
    return Path(tempfile.gettempdir()) / f"sdxl-worker-loras-{os.getuid()}"


def spare_folder() -> Path:
    """This user's own folder in the container's temporary space.

    Raises CacheWriteError when that cannot be had, or belongs to someone else.
    """
    folder = spare_path()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise CacheWriteError("neither the LoRA cache nor local temporary space can be written") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise CacheWriteError("the local temporary folder for LoRAs belongs to someone else")
    return folder
