"""Other names of cached files: links beside them, as requests asked for (`{"path": ..., "name": ...}`)."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from sdxl_worker.assets.folder import not_written
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.references import WEIGHT_SUFFIXES
from sdxl_worker.errors import BadReference, CacheWriteError
from sdxl_worker.text import safe_name, shown

# How a link that the worker made begins; one of an operator's does not.
_OURS = "./"


def is_other_name(path: Path) -> bool:
    """True for a link that `add` made."""
    try:
        return os.readlink(path).startswith(_OURS)
    except OSError:
        return False


def add(path: Path, name: str, folder: Path, kind: Kind) -> str:
    """Let `name`, made fit for a file, lead to the file `path` below `folder`; gives the name as it became.

    A link of ours is replaced, since the caller says anew what the name means; a file never is. Raises BadReference
    and CacheWriteError.
    """
    stem = safe_name(next((name.removesuffix(suffix) for suffix in WEIGHT_SUFFIXES if name.endswith(suffix)), name))
    if not stem:
        raise BadReference(f"the name {shown(name)} cannot be that of a file")
    if not path.is_relative_to(folder):
        raise CacheWriteError(f"the file lies in temporary space, where it cannot be named {stem}")
    link = folder / f"{stem}.safetensors"
    for existing in (folder / f"{stem}{suffix}" for suffix in WEIGHT_SUFFIXES):
        if os.path.lexists(existing) and not is_other_name(existing) and existing != path:
            raise BadReference(f"the {kind.name} cache holds another file named {existing.name}, which keeps its name")
    if link != path:
        _link(f"{_OURS}{path.relative_to(folder)}", link)
    return stem


def remove_dangling(folder: Path) -> None:
    """Remove the names of files that have been evicted."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if is_other_name(path) and not path.exists():
                path.unlink(missing_ok=True)


def _link(target: str, link: Path) -> None:
    """Atomically, whatever was there; raises CacheWriteError."""
    with contextlib.suppress(OSError):
        if os.readlink(link) == target:
            return
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(error) from error
