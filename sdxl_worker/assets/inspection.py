"""What can be said of a local file without knowing its kind: size, hash, whether it is a pickle."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.kind import Kind
from sdxl_worker.errors import TooLarge
from sdxl_worker.settings import Settings

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def is_pickle(path: Path) -> bool:
    """True when the content, whatever the name says, is what torch.save writes: a zip archive or a bare pickle.

    A safetensors file starts with the length of its header, 8 bytes little-endian; where that could be mistaken for a
    pickle, its next byte is the header's opening brace.
    """
    with path.open("rb") as handle:
        start = handle.read(9)
    return start.startswith(_PICKLE_STARTS) and start[8:9] != b"{"


def pickle_to_safetensors(source: Path, target: Path, budget: Budget) -> None:
    """Convert a pickle within `budget`; raises BadFile, FetchTimeout and Cancelled."""
    # Reading tensors needs torch, which takes seconds to import: a cache hit and the command line's help do without.
    from sdxl_worker.assets.pickles import convert_pickle

    convert_pickle(source, target, budget)


def add_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with `metadata` added to its own; raises BadFile or WrongFile."""
    from sdxl_worker.assets.safetensors_file import copy_with_metadata

    copy_with_metadata(source, target, metadata)


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def max_download_bytes(kind: Kind, settings: Settings) -> int:
    """The kind's own limit, and for what a request names the SDK's RUNPOD_MAX_DOWNLOAD_BYTES where that is smaller."""
    from runpod.serverless.utils.rp_ssrf import max_download_bytes

    own = kind.max_bytes(settings)
    return own if kind.is_operators else min(own, max_download_bytes())


def check_size(path: Path, kind: Kind, settings: Settings) -> None:
    """Raises TooLarge when the file is over its kind's limit, before anything of it is read."""
    limit = kind.max_bytes(settings)
    if path.stat().st_size > limit:
        raise TooLarge(f"{path.name} is larger than the {limit / 1e6:g} MB that are allowed")
