"""What a caller should know about how a prompt was read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.chunks import items_of
from sdxl_worker.prompts.parse import BREAK, ParsedPrompt, Piece, parse
from sdxl_worker.prompts.reading import syntax_of, texts_of
from sdxl_worker.prompts.vectors import ENCODERS, NO_EMBEDDINGS, Embeddings
from sdxl_worker.request import GenerationRequest
from sdxl_worker.text import shown

_ESCAPED = re.compile(r"\\[()\[\]]")


def notes_on(
    request: GenerationRequest, tokenizers: Mapping[str, Any], embeddings: Embeddings = NO_EMBEDDINGS
) -> list[str]:
    """A sentence for each thing in the prompts that has no effect, or not the one that it looks like."""
    sentences = []
    for name, text in texts_of(request).items():
        if syntax_of(request) == "plain":
            sentences += [*unread(name, text, tokenizers[ENCODERS[0]], embeddings), *misread(name, text)]
        else:
            sentences += not_used(name, text)
    return sentences


def unread(name: str, text: str, tokenizer: Any, embeddings: Embeddings = NO_EMBEDDINGS) -> list[str]:
    """That the prompt is longer than a text encoder reads: diffusers cuts it off silently."""
    limit = tokenizer.model_max_length
    items = items_of([Piece(text)], tokenizer, ENCODERS[0], embeddings)
    tokens = sum(len(item.ids) for item in items if item is not None)
    # Two of the places are taken by the start and the end of the text.
    return [f"{name} has {tokens} tokens; the model reads the first {limit - 2}"] if tokens > limit - 2 else []


def misread(name: str, text: str) -> list[str]:
    """That a prompt which is read as plain text was written for AUTOMATIC1111's syntax, and where it shows."""
    try:
        parsed = parse(text, "a1111")
    except InvalidRequest:
        found = ["emphasis"]
    else:
        found = [*_emphasis(parsed), *_breaks(parsed), *[f"the tag {shown(tag.text)}" for tag in parsed.tags[:1]]]
    if escaped := _ESCAPED.search(text):
        found.append(f"the escaped bracket {escaped[0]}")
    if not found:
        return []
    return [f'{name} holds {", ".join(found)}, read as plain words; set prompt_syntax to "a1111" for its meaning']


def not_used(name: str, text: str) -> list[str]:
    """What of the a1111 syntax stands in the prompt and has no effect, or not the one it looks like."""
    parsed = parse(text, "a1111")
    sentences = [
        f"{name}: {shown(tag.text)} is not supported and was left out" for tag in parsed.tags if tag.kind != "lora"
    ]
    if any(BREAK in piece.text and not piece.is_break and piece.weight != 1 for piece in parsed.pieces):
        sentences.append(f"{name}: BREAK inside of brackets is read as a word, as AUTOMATIC1111 does; put it outside")
    return sentences


def _emphasis(parsed: ParsedPrompt) -> list[str]:
    for piece in parsed.pieces:
        if piece.weight != 1 and not piece.is_break:
            return [f"emphasis ({shown(piece.text.strip())} with weight {piece.weight:.4g})"]
    return []


def _breaks(parsed: ParsedPrompt) -> list[str]:
    return [BREAK] if any(piece.is_break for piece in parsed.pieces) else []
