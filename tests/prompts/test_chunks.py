"""Which tokens share a chunk. Every lone letter and every comma is one token of the tiny tokenizer."""

from __future__ import annotations

import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.chunks import Chunk, Item, chunks_of, first_chunk, items_of
from sdxl_worker.prompts.parse import parse
from sdxl_worker.prompts.reading import read
from sdxl_worker.prompts.vectors import ENCODERS, NO_EMBEDDINGS, Vectors

TOKENIZER, TOKENIZER_2 = topology.tokenizers()
TOKENIZERS = dict(zip(ENCODERS, (TOKENIZER, TOKENIZER_2), strict=True))


class OneWord:
    """The word EMB stands for n vectors."""

    def __init__(self, count: int) -> None:
        self.vectors = Vectors("EMB", torch.ones(count, 16))

    def split(self, text: str, _encoder: str) -> list[str | Vectors]:
        before, found, after = text.partition("EMB")
        return [before, self.vectors, *self.split(after, _encoder)] if found else [text]


def lengths(text: str, embeddings=NO_EMBEDDINGS) -> list[int]:
    items = items_of(parse(text, "a1111").pieces, TOKENIZER, "text_encoder", embeddings)
    return [sum(len(item.ids) for item in chunk.items) for chunk in chunks_of(items, TOKENIZER)]


def words(count: int) -> str:
    return "x " * count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(151), [75, 75, 1]),
        (words(400), [75, 75, 75, 75, 75, 25]),
        # A comma after nine words each: the 70th place holds the last one before each chunk's end.
        ((words(9) + ", ") * 40, [70, 70, 70, 70, 70, 50]),
        # The comma in the 56th place is 20 places before the end and is looked back to; the one in the 55th is not.
        (words(55) + ", " + words(20), [56, 20]),
        (words(54) + ", " + words(21), [75, 1]),
        # No need to move anything when the text ends with the chunk, or when the next token is a comma itself.
        (words(70) + ", " + words(4), [75]),
        (words(70) + ", " + words(4) + ", x", [75, 2]),
        # That comma begins the second chunk and is not looked back to from its end.
        (words(75) + ", " + words(74) + "x", [75, 75, 1]),
        # A comma is looked back to in its own chunk only.
        (words(70) + ", " + words(4 + 71), [71, 75]),
        (words(70) + ", " + words(4 + 72), [71, 75, 1]),
        (words(60) + ", BREAK" + " x" * 76, [61, 75, 1]),
        ("x BREAK x x", [1, 2]),
        ("x BREAK", [1]),
        ("BREAK x", [0, 1]),
        ("x BREAK BREAK x", [1, 0, 1]),
        (words(75) + "BREAK x", [75, 1]),
    ],
)
def test_how_many_tokens_each_chunk_has(text: str, expected: list[int]) -> None:
    assert lengths(text) == expected


def test_vectors_never_straddle_a_chunk() -> None:
    assert lengths(words(67) + "EMB x", OneWord(8)) == [75, 1]
    assert lengths(words(68) + "EMB x", OneWord(8)) == [68, 9]
    assert lengths(words(74) + "EMB x", OneWord(1)) == [75, 1]
    # The look-back moves them whole, with the word before them.
    assert lengths(words(65) + ", x EMB x", OneWord(8)) == [66, 10]
    assert lengths("EMB", OneWord(75)) == [75]
    with pytest.raises(InvalidRequest, match="76 vectors"):
        lengths("EMB", OneWord(76))


def test_a_chunk_as_ids_and_weights() -> None:
    items = (Item((5,), 1.2), Item((0, 0), 0.5, Vectors("EMB", torch.ones(2, 16))))
    chunk = Chunk(items)
    assert chunk.ids(TOKENIZER) == [512, 5, 0, 0, 513] + [513] * 72
    assert chunk.ids(TOKENIZER_2) == [512, 5, 0, 0, 513] + [0] * 72
    assert chunk.weights() == [1, 1.2, 0.5, 0.5] + [1] * 73
    assert [(place, vectors.name) for place, vectors in chunk.vectors()] == [(2, "EMB")]


def test_a_full_chunk_ends_with_the_end_token() -> None:
    (chunk,) = chunks_of([Item((5,), 1.0)] * 75, TOKENIZER)
    assert chunk.ids(TOKENIZER_2) == [512] + [5] * 75 + [513]


def test_the_stock_tokenizer_gives_the_same_ids() -> None:
    for text in ("a lighthouse, at dusk (oil) <|endoftext|> é", "", words(75)):
        for encoder, tokenizer in TOKENIZERS.items():
            chunk = read(text, "plain", TOKENIZERS, NO_EMBEDDINGS).chunks[encoder][0]
            assert chunk.ids(tokenizer) == tokenizer(text, padding="max_length", max_length=77).input_ids


def test_plain_prompts_keep_what_fits() -> None:
    for count in (75, 76, 300):
        (chunk,) = first_chunk(items_of(parse(words(count), "plain").pieces, TOKENIZER, "text_encoder", NO_EMBEDDINGS))
        assert chunk.ids(TOKENIZER) == TOKENIZER(words(count), max_length=77, truncation=True).input_ids


def test_at_most_twenty_chunks() -> None:
    assert read(words(1500), "a1111", TOKENIZERS, NO_EMBEDDINGS).length == 20
    with pytest.raises(InvalidRequest, match="takes 21 chunks of 75 tokens and may take at most 20"):
        read(words(1501), "a1111", TOKENIZERS, NO_EMBEDDINGS)
