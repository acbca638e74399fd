"""The `embeddings` list of a request: one EmbeddingSpec per usable entry, one warning per entry that is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdxl_worker.lora_entries import kind_of, unknown_in
from sdxl_worker.request import REFERENCE_KEYS, EmbeddingSpec
from sdxl_worker.text import clean_text, is_clean

MAX_TOKEN_CHARACTERS = 200
_KNOWN_KEYS = (*REFERENCE_KEYS, "token")


def parse_embedding_entries(entries: Sequence[Any]) -> tuple[tuple[EmbeddingSpec, ...], tuple[str, ...]]:
    """The usable entries in order, and a sentence for each skipped entry or ignored key, naming its index.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS and an optional `token`: what stands for the
    embedding in a prompt. Whether the reference means anything is decided when it is resolved.
    """
    specs: list[EmbeddingSpec] = []
    warnings: list[str] = []
    for index, entry in enumerate(entries):
        try:
            specs.append(EmbeddingSpec(_reference(entry), _token(entry), index))
        except ValueError as problem:
            warnings.append(f"embeddings[{index}] was skipped: {problem}")
            continue
        if isinstance(entry, dict) and (unknown := unknown_in(entry, _KNOWN_KEYS)):
            warnings.append(f"embeddings[{index}]: ignored unknown {unknown}; known are path and token")
    return tuple(specs), tuple(warnings)


def _reference(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"it is a {kind_of(entry)}, not a string or an object with path and token")
    given = next((key for key in REFERENCE_KEYS if entry.get(key) not in (None, "")), None)
    if given is None:
        raise ValueError("it has no path")
    if not isinstance(entry[given], str):
        raise ValueError(f"its {given} is a {kind_of(entry[given])}, not a string")
    return entry[given]


def _token(entry: Any) -> str:
    token = entry.get("token") if isinstance(entry, dict) else None
    if token in (None, ""):
        return ""
    if not isinstance(token, str):
        raise ValueError(f"its token is a {kind_of(token)}, not a string")
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise ValueError(f"its token has more than {MAX_TOKEN_CHARACTERS} characters")
    clean = clean_text(token) if is_clean(token) else ""
    if not clean:
        raise ValueError("its token has no character that could stand in a prompt")
    return clean
