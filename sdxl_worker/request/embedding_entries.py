"""The `embeddings` list of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_worker.request.entries import parse_entries, reference_in, text_in
from sdxl_worker.request.values import EmbeddingSpec
from sdxl_worker.text import clean_text, is_clean

MAX_TOKEN_CHARACTERS = 200
_KEYS = ("token",)


def parse_embedding_entries(entries: Sequence[Any]) -> tuple[tuple[EmbeddingSpec, ...], tuple[str, ...]]:
    """The usable entries in order, and a sentence for each skipped entry or ignored key, naming its index.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS and an optional `token`: what stands for the
    embedding in a prompt. Whether the reference means anything is decided when it is resolved.
    """
    return parse_entries("embeddings", entries, _KEYS, _spec)


def _spec(entry: Mapping[str, Any], index: int) -> EmbeddingSpec:
    return EmbeddingSpec(_reference(entry), _token(entry), index)


def _reference(entry: Mapping[str, Any]) -> str:
    reference = reference_in(entry)
    if not reference:
        raise ValueError("it has no path")
    return reference


def _token(entry: Mapping[str, Any]) -> str:
    token = text_in(entry, "token")
    if not token:
        return ""
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise ValueError(f"its token has more than {MAX_TOKEN_CHARACTERS} characters")
    clean = clean_text(token) if is_clean(token) else ""
    if not clean:
        raise ValueError("its token has no character that could stand in a prompt")
    return clean
