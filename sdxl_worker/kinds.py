"""The kinds of asset, and how each is checked: here, and not in `assets`, which knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_worker.assets.kind import Kind
from sdxl_worker.errors import AccessDenied, Ambiguous, AssetFileError, BadReference, FetchError, NotFound, WrongFile


def _check_lora(path: Path) -> Mapping[str, Any]:
    # Reading tensors needs torch, which takes seconds to import: a cache hit and the command line's help do without.
    from sdxl_worker.lora.file import check_lora_file

    return check_lora_file(path).as_json()


LORA = Kind(
    name="LoRA",
    suffixes=(".safetensors", ".pt", ".bin"),
    folder=lambda settings: settings.lora_cache_dir,
    max_bytes=lambda settings: int(settings.lora_max_mb * 1e6),
    check=_check_lora,
    codes={
        FetchError: "LORA_DOWNLOAD",
        BadReference: "LORA_REFERENCE",
        NotFound: "LORA_NOT_FOUND",
        Ambiguous: "LORA_AMBIGUOUS",
        AccessDenied: "LORA_AUTH",
        AssetFileError: "LORA_FILE",
        WrongFile: "NOT_A_LORA",
    },
)
