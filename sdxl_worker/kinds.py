"""The kinds of asset, and how each is checked: here, and not in `assets`, which knows no format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdxl_worker.assets.kind import Kind
from sdxl_worker.data_uris import MAX_PICTURE_BYTES
from sdxl_worker.errors import (
    AccessDenied,
    Ambiguous,
    AssetFileError,
    BadReference,
    FetchError,
    NotFound,
    WorkerError,
    WrongFile,
)

# What the facts of an embedding call its format.
EMBEDDING_FORMAT = "textual inversion"


def _check_lora(path: Path) -> Mapping[str, Any]:
    # Reading tensors needs torch, which takes seconds to import: a cache hit and the command line's help do without.
    from sdxl_worker.lora.file import check_lora_file

    return check_lora_file(path).as_json()


def _check_embedding(path: Path) -> Mapping[str, Any]:
    from sdxl_worker.prompts.embedding_file import check_embedding_file

    return {"format": EMBEDDING_FORMAT, **check_embedding_file(path)}


def _check_checkpoint(path: Path) -> Mapping[str, Any]:
    from sdxl_worker.assets.safetensors_file import read_header

    entries = read_header(path).entries
    if not entries:
        raise WrongFile("the file holds no tensors")
    return {"tensors": len(entries)}


def _checkpoint_folder(_settings: object) -> Path:
    """Beside the Hub's cache, since the image carries both along."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "checkpoints"


def _family(*bases: type[WorkerError]) -> Iterator[type[WorkerError]]:
    for base in bases:
        yield base
        yield from _family(*base.__subclasses__())


def _codes(word: str, *, wrong_file: str) -> Mapping[type[WorkerError], str]:
    """The codes of a kind that requests name by references."""
    return MappingProxyType(
        {
            FetchError: f"{word}_DOWNLOAD",
            BadReference: f"{word}_REFERENCE",
            NotFound: f"{word}_NOT_FOUND",
            Ambiguous: f"{word}_AMBIGUOUS",
            AccessDenied: f"{word}_AUTH",
            AssetFileError: f"{word}_FILE",
            WrongFile: wrong_file,
        }
    )


LORA = Kind(
    name="LoRA",
    suffixes=(".safetensors", ".pt", ".bin"),
    folder=lambda settings: settings.lora_cache_dir,
    cache_limit=lambda settings: settings.lora_cache_max_gb * 1e9,
    max_bytes=lambda settings: int(settings.lora_max_mb * 1e6),
    timeout_s=lambda settings: settings.download_timeout,
    check=_check_lora,
    codes=_codes("LORA", wrong_file="NOT_A_LORA"),
    knows=lambda name: name != EMBEDDING_FORMAT,
)

# Textual inversion. Beside the LoRAs: one cache, one limit.
EMBEDDING = Kind(
    name="embedding",
    suffixes=(".safetensors", ".pt", ".bin", ".pti"),
    folder=LORA.folder,
    cache_limit=LORA.cache_limit,
    max_bytes=LORA.max_bytes,
    timeout_s=LORA.timeout_s,
    check=_check_embedding,
    codes=_codes("EMBEDDING", wrong_file="NOT_AN_EMBEDDING"),
    knows=lambda name: name == EMBEDDING_FORMAT,
    usual_file="learned_embeds.safetensors",
)

# MODEL_ID as a single file.
CHECKPOINT = Kind(
    name="checkpoint",
    suffixes=(".safetensors",),
    sources=("civitai", "hub", "url"),
    folder=_checkpoint_folder,
    max_bytes=lambda _: 64 << 30,
    timeout_s=lambda _: 3 * 3600.0,
    check=_check_checkpoint,
    codes=MappingProxyType(dict.fromkeys(_family(FetchError, AssetFileError), "MODEL_UNAVAILABLE")),
    is_operators=True,
)

# VAE_ID as a single file.
VAE = replace(CHECKPOINT, name="VAE")

# A picture that a request starts from, or a mask; it is read into memory and checked by decoding it.
PICTURE = Kind(
    name="picture",
    suffixes=(),
    sources=("url",),
    max_bytes=lambda _: MAX_PICTURE_BYTES,
    timeout_s=lambda settings: settings.download_timeout,
    codes=MappingProxyType(
        {FetchError: "FETCH_FAILED"}
        | dict.fromkeys(_family(BadReference, NotFound, AccessDenied, Ambiguous, AssetFileError), "INVALID_INPUT")
    ),
)
