"""Where vectors from outside enter a prompt: in the place of words, before the text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# The text encoders' names in the pipeline; each has the tokenizer of the same number.
ENCODERS = ("text_encoder", "text_encoder_2")
# Vectors (n, the encoder's width) for each text encoder by its name, as many for both.
VectorTable = Mapping[str, torch.Tensor]


def widths_of(pipeline: Any) -> tuple[int, int]:
    """How many numbers a token's vector has in each text encoder."""
    first, second = (getattr(pipeline, name).config.hidden_size for name in ENCODERS)
    return int(first), int(second)


@dataclass(frozen=True)
class Vectors:
    """What stands in a prompt instead of a word: `values` of shape (places, the encoder's width), any float dtype."""

    name: str
    values: torch.Tensor


class Embeddings(Protocol):
    """Finds the words of a prompt that have vectors."""

    def split(self, text: str, encoder: str) -> Iterable[str | Vectors]:
        """`text` in order: strings that are tokenised as they are, and vectors for the text encoder of that name.

        Both encoders must get the same number of places for the same text.
        """


@dataclass(frozen=True)
class _NoEmbeddings:
    """Every word stays a word."""

    def split(self, text: str, _encoder: str) -> Iterable[str | Vectors]:
        """The text itself."""
        return (text,)


NO_EMBEDDINGS: Embeddings = _NoEmbeddings()
