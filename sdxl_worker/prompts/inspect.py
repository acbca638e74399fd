"""How prompts were read, place by place: chunk, token and weight for both text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from sdxl_worker.prompts.chunks import Chunk
from sdxl_worker.prompts.reading import NEGATIVE, ReadPrompt, read_prompts, texts_of
from sdxl_worker.prompts.vectors import ENCODERS, NO_EMBEDDINGS, Embeddings
from sdxl_worker.request import GenerationRequest

_COLUMNS = ("prompt", "chunk", *(f"{name}: {what}" for name in ENCODERS for what in ("token", "weight")))


def inspection(
    request: GenerationRequest, tokenizers: Mapping[str, Any], embeddings: Embeddings = NO_EMBEDDINGS
) -> dict[str, Any]:
    """The answer's `inspection` (for programs) and `table` (for people); raises InvalidRequest.

    With `prompts` the former has a list of that name, and the latter rows for each of them. Each chunk lists
    [token, weight] for each text encoder. `</w>` ends a word; an embedding's places have its name.
    """
    positives, negative = read_prompts(request, tokenizers, embeddings)
    names = [name for name in texts_of(request) if name != NEGATIVE]
    found = {name: _chunks(read, tokenizers) for name, read in zip(names, positives, strict=True)}
    many = {"prompts": [*found.values()]} if request.prompts else found
    last = {NEGATIVE: None if negative is None else _chunks(negative, tokenizers)}
    syntax = {"prompt_syntax": request.prompt_syntax, "prompt_emphasis": request.prompt_emphasis}
    return {"inspection": {**syntax, **many, **last}, "table": _table({**found, **last})}


def _chunks(prompt: ReadPrompt, tokenizers: Mapping[str, Any]) -> list[dict[str, list[list[Any]]]]:
    return [
        {name: [*_places(prompt.chunks[name][index], tokenizers[name])] for name in ENCODERS}
        for index in range(prompt.length)
    ]


def _places(chunk: Chunk, tokenizer: Any) -> Iterator[list[Any]]:
    for item in chunk.items:
        for index, token in enumerate(item.ids):
            if item.vectors is None:
                yield [tokenizer.convert_ids_to_tokens(token), item.weight]
            else:
                yield [f"{item.vectors.name} [{index + 1}/{len(item.ids)}]", item.weight]


def _table(found: Mapping[str, Any]) -> str:
    rows = [list(_COLUMNS)]
    for name, chunks in found.items():
        for number, chunk in enumerate(chunks or (), 1):
            for places in itertools.zip_longest(*chunk.values(), fillvalue=("", "")):
                shown = [text if isinstance(text, str) else f"{text:.4g}" for place in places for text in place]
                rows.append([name, str(number), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
