"""Other names of fetched files: links beside them, as requests asked for (`{"path": ..., "name": ...}`)."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from sdxl_worker.assets.folder import not_written
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.references import WEIGHT_SUFFIXES, safe_stem
from sdxl_worker.assets.sources.local import link_to_fetched
from sdxl_worker.errors import BadReference
from sdxl_worker.text import shown


def add(path: Path, name: str, folder: Path, kind: Kind) -> str:
    """Let `name`, made fit for a file, lead to the fetched file `path` in `folder`; gives the name as it became.

    A link of ours is replaced, since the caller says anew what the name means; a file never is. Raises BadReference
    and CacheWriteError.
    """
    stem = next((name.removesuffix(suffix) for suffix in WEIGHT_SUFFIXES if name.endswith(suffix)), name)
    link = folder / f"{safe_stem(stem)}.safetensors"
    if not safe_stem(stem):
        raise BadReference(f"the name {shown(name)} cannot be that of a file")
    if path.parent != folder or link == path or link_to_fetched(link) == path.name:
        return link.stem  # in temporary space nothing is kept; or the file has that name already
    if os.path.lexists(link) and link_to_fetched(link) is None:
        raise BadReference(f"the {kind.name} cache holds another file named {link.name}, which keeps its name")
    temporary = folder / f".{link.name}.{secrets.token_hex(4)}"
    try:
        os.symlink(path.name, temporary)
        os.replace(temporary, link)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(error) from error
    return link.stem
