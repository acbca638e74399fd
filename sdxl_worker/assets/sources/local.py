"""A file inside the cache folder, by its name: one that an operator put there, or that was fetched before."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.other_names import is_other_name
from sdxl_worker.assets.references import MAX_PART, WEIGHT_SUFFIXES, Reference, hashed_name
from sdxl_worker.errors import Ambiguous, BadReference, NotFound
from sdxl_worker.masking import mask
from sdxl_worker.settings import Settings
from sdxl_worker.text import safe_name

SHOWN_CANDIDATES = 10
_FETCHED = re.compile(r"[0-9a-f]{12}_(?P<readable>.+)\.safetensors")


@dataclass(frozen=True)
class CachedReference(Reference):
    """A file already inside the cache folder, by its path relative to it; the suffix may be left out."""

    name: str

    @property
    def canonical(self) -> str:
        return f"cached:{self.name}"

    @property
    def shown(self) -> str:
        return self.name

    @property
    def file_name(self) -> str:
        """The checked file's name: the file itself, or for a pickle the name of its converted copy."""
        if self.name.endswith(".safetensors"):
            return self.name
        if self.name.endswith(WEIGHT_SUFFIXES):
            return hashed_name(self.canonical, Path(self.name).name)
        return f"{self.name}.safetensors"


def parse(text: str, settings: Settings, kind: Kind) -> CachedReference | None:
    """A name without slashes, or an absolute path inside the cache folder; raises BadReference for another one."""
    if not text.startswith("/"):
        return None if re.search(r"[:/]", text) else _parse_relative(text, kind)
    path = Path(text)
    if ".." not in path.parts:
        folder = kind.folder_in(settings)
        for form in (folder.absolute(), folder.resolve()):
            if path.is_relative_to(form) and path != form:
                return _parse_relative(str(path.relative_to(form)), kind)
    raise BadReference(f"an absolute path must lie inside the {kind.name} cache folder")


def _parse_relative(text: str, kind: Kind) -> CachedReference:
    parts = text.split("/")
    if len(text.encode()) > 1024 or any(
        part.startswith(".") or not part or len(part.encode()) > MAX_PART for part in parts
    ):
        raise BadReference(f"the {kind.name} reference {mask(text)} is not a valid file name")
    return CachedReference(text)


def find(reference: CachedReference, folder: Path, kind: Kind) -> CachedReference:
    """The file that is there, by its whole name inside `folder`; no network call.

    The name may lack its suffix, or the hash in front of a fetched file's name as long as only one file has the rest.
    Raises BadReference for a link out of the folder, NotFound, and Ambiguous with the candidates.
    """
    stem, suffix = _split(reference.name)
    names = [reference.name] if suffix else [stem + suffix for suffix in kind.suffixes]
    for name in [*names, f"{safe_name(stem)}.safetensors"]:
        found = _real_name(name, folder, kind)
        if found is not None:
            return CachedReference(found)
    fetched = _fetched_as(stem, folder)
    if len(fetched) > 1:
        listed = ", ".join(fetched[:SHOWN_CANDIDATES]) + (", ..." if len(fetched) > SHOWN_CANDIDATES else "")
        raise Ambiguous(f"the {kind.name} cache holds {len(fetched)} files named {reference.name}; name one: {listed}")
    if not fetched:
        raise NotFound(f"the {kind.name} cache holds no file named {reference.name}")
    return CachedReference(fetched[0])


def _split(name: str) -> tuple[str, str]:
    for suffix in WEIGHT_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _real_name(name: str, folder: Path, kind: Kind) -> str | None:
    """Where links inside `folder` lead; None when there is no such file."""
    path = folder / name
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if not os.path.islink(path) or is_other_name(path):
            return None
        raise BadReference(f"{name} in the {kind.name} cache is a link to nowhere") from None
    except OSError:
        return None
    real, real_folder = os.path.realpath(path), os.path.realpath(folder)
    if not real.startswith(real_folder + os.sep) or not stat.S_ISREG(found.st_mode):
        raise BadReference(f"{name} in the {kind.name} cache is not a file inside the cache folder")
    return os.path.relpath(real, real_folder)


def _fetched_as(stem: str, folder: Path) -> list[str]:
    """The fetched files whose name is `stem` but for hash and suffix."""
    wanted = {stem, safe_name(stem)}
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    named = [name for name in names if (found := _FETCHED.fullmatch(name)) and found["readable"] in wanted]
    return sorted(name for name in named if os.path.isfile(folder / name) and not os.path.islink(folder / name))
