"""A prompt's pieces -> chunks of 77 places for one text encoder, as AUTOMATIC1111's modules/sd_hijack_clip.py does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.parse import Piece
from sdxl_worker.prompts.vectors import Embeddings, Vectors

# Places for the text; start and end of the text take one more each.
CHUNK_PLACES = 75
# How far before a full chunk's end the last comma may be for what follows it to move on into the next chunk together.
COMMA_LOOK_BACK = 20
COMMA = ",</w>"
# The token that stands under a vector: any but the end of the text, by which the pooled state is found.
PLACEHOLDER = 0


@dataclass(frozen=True)
class Item:
    """What stays together: one token, or an embedding's vectors with a placeholder for each."""

    ids: tuple[int, ...]
    weight: float
    vectors: Vectors | None = None


@dataclass(frozen=True)
class Chunk:
    """At most 75 places of text."""

    items: tuple[Item, ...] = ()

    def ids(self, tokenizer: Any) -> list[int]:
        """77 token ids: start, text, end, and the tokenizer's padding."""
        text = [token for item in self.items for token in item.ids]
        ids = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
        return ids + [tokenizer.pad_token_id] * (CHUNK_PLACES + 2 - len(ids))

    def weights(self) -> list[float]:
        """77 weights; 1 for all that is not text."""
        text = [item.weight for item in self.items for _ in item.ids]
        return [1.0, *text] + [1.0] * (CHUNK_PLACES + 1 - len(text))

    def vectors(self) -> Iterator[tuple[int, Vectors]]:
        """The vectors with the place, 1 to 75, of the first of them."""
        place = 1
        for item in self.items:
            if item.vectors is not None:
                yield place, item.vectors
            place += len(item.ids)

    @property
    def is_weighted(self) -> bool:
        """True when some weight is not 1."""
        return any(item.weight != 1 for item in self.items)


def items_of(pieces: Iterable[Piece], tokenizer: Any, encoder: str, embeddings: Embeddings) -> Iterator[Item | None]:
    """The items of the pieces in order, None for each BREAK. Each piece is tokenised on its own."""
    for piece in pieces:
        if piece.is_break:
            yield None
            continue
        for part in embeddings.split(piece.text, encoder):
            if isinstance(part, Vectors):
                yield Item((PLACEHOLDER,) * len(part.values), piece.weight, part)
            else:
                # verbose would warn about texts of more than 77 tokens, which is what this is for
                ids = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
                yield from (Item((token,), piece.weight) for token in ids)


def chunks_of(items: Iterable[Item | None], tokenizer: Any) -> tuple[Chunk, ...]:
    """The items in chunks, at least one; raises InvalidRequest for an item that no chunk can hold."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    filling = _Filling()
    for item in items:
        if item is None:
            filling.end_chunk()
        elif item.vectors is None and item.ids[0] == comma:
            filling.make_room(1)
            filling.comma = (len(filling.items), filling.places)
            filling.add(item)
        else:
            if filling.is_full:
                filling.end_chunk(filling.after_last_comma())
            filling.make_room(len(item.ids))
            filling.add(item)
    if filling.items or not filling.chunks:
        filling.end_chunk()
    return tuple(filling.chunks)


def first_chunk(items: Iterable[Item | None]) -> tuple[Chunk, ...]:
    """One chunk with as many of the items as it holds: how a model reads a prompt that may not have more."""
    kept: list[Item] = []
    places = 0
    for item in items:
        if item is not None:
            places += len(item.ids)
            if places > CHUNK_PLACES:
                break
            kept.append(item)
    return (Chunk(tuple(kept)),)


@dataclass
class _Filling:
    """The chunks so far and the one that is being filled."""

    chunks: list[Chunk] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    places: int = 0
    # The last comma's index among the items, and how many places are before it; None: no comma in this chunk.
    comma: tuple[int, int] | None = None

    @property
    def is_full(self) -> bool:
        return self.places == CHUNK_PLACES

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.places += len(item.ids)

    def make_room(self, places: int) -> None:
        """End the chunk when it has no room for so many more."""
        if places > CHUNK_PLACES:
            raise InvalidRequest(f"holds an embedding of {places} vectors, of which at most {CHUNK_PLACES} can be used")
        if self.places + places > CHUNK_PLACES:
            self.end_chunk()

    def after_last_comma(self) -> int:
        """How many of the last items stand after a comma that is near enough to the end; 0: none."""
        if self.comma is None or CHUNK_PLACES - self.comma[1] > COMMA_LOOK_BACK:
            return 0
        return len(self.items) - self.comma[0] - 1

    def end_chunk(self, moving: int = 0) -> None:
        """Put the chunk to the others; its last `moving` items begin the next one."""
        keep = len(self.items) - moving
        self.chunks.append(Chunk(tuple(self.items[:keep])))
        self.items = self.items[keep:]
        self.places = sum(len(item.ids) for item in self.items)
        self.comma = None
