"""Check a LoRA file before it counts as cached: size, kind, structure and values."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_worker.errors import BadFile, TooLarge
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def check_file(path: Path) -> dict[str, Any]:
    """The JSON-ready facts of a safetensors LoRA; raises WrongFile or BadFile."""
    # Reading tensors needs torch, which takes seconds to import: a cache hit and the command line's help do without.
    from sdxl_worker.lora.file import check_lora_file

    return check_lora_file(path).as_json()


def is_pickle(path: Path) -> bool:
    """True when the content, whatever the name says, is what torch.save writes: a zip archive or a bare pickle.

    A safetensors file starts with the length of its header, 8 bytes little-endian; where that could be mistaken for a
    pickle, its next byte is the header's opening brace.
    """
    with path.open("rb") as handle:
        start = handle.read(9)
    return start.startswith(_PICKLE_STARTS) and start[8:9] != b"{"


def pickle_to_safetensors(source: Path, target: Path, suffix: str) -> None:
    """Convert a pickle that is announced as one; raises BadFile, also when it goes under another name."""
    if suffix == ".safetensors":
        raise BadFile("the file is a pickle under the name of a .safetensors file")
    from sdxl_worker.assets.pickles import convert_pickle

    convert_pickle(source, target)


def add_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with `metadata` added to its own; raises BadFile or WrongFile."""
    from sdxl_worker.assets.safetensors_file import copy_with_metadata

    copy_with_metadata(source, target, metadata)


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def max_lora_bytes(settings: Settings) -> int:
    """The smaller of LORA_MAX_MB and the SDK's RUNPOD_MAX_DOWNLOAD_BYTES."""
    from runpod.serverless.utils.rp_ssrf import max_download_bytes

    return min(int(settings.lora_max_mb * 1e6), max_download_bytes())


def check_size(path: Path, settings: Settings) -> None:
    """Raises TooLarge when the file is over LORA_MAX_MB, before anything of it is read."""
    if path.stat().st_size > settings.lora_max_mb * 1e6:
        raise TooLarge(f"{path.name} is larger than LORA_MAX_MB ({settings.lora_max_mb:g} MB)")
