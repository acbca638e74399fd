"""Small embeddings, and a copy of a pipeline whose tokenizers and token tables hold them as words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Vectors = tuple[torch.Tensor, torch.Tensor]


def vectors(pipeline: Any, count: int, seed: int = 0) -> Vectors:
    """`count` vectors for each text encoder, as large as its own."""
    generator = torch.Generator().manual_seed(seed + count)
    tables = [encoder.get_input_embeddings().weight for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    first, second = (torch.randn(count, table.shape[1], generator=generator) * table.std() for table in tables)
    return first, second


def save_embedding(path: Path, of: Vectors, names: tuple[str, str] = ("clip_l", "clip_g")) -> Path:
    """A file with one tensor for each text encoder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(names, (one.contiguous() for one in of), strict=True)), path)
    return path


def with_words(pipeline: Any, **words: Vectors) -> Any:
    """A copy in which `<name-0>`, `<name-1>` and so on are tokens whose rows of the token table are the vectors."""
    changed = copy.deepcopy(pipeline)
    for index, suffix in enumerate(("", "_2")):
        tokenizer, encoder = getattr(changed, f"tokenizer{suffix}"), getattr(changed, f"text_encoder{suffix}")
        table = encoder.get_input_embeddings()
        # The tiny model's table has rows to spare.
        rows = torch.cat([table.weight[: len(tokenizer)], *(of[index] for of in words.values())])
        tokenizer.add_tokens([f"<{name}-{row}>" for name, of in words.items() for row in range(len(of[index]))])
        encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
    return changed


def word(name: str, count: int) -> str:
    """The tokens of `with_words` in a row."""
    return "".join(f"<{name}-{row}>" for row in range(count))
