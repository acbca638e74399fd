r"""A prompt's text -> pieces with weights, as AUTOMATIC1111's modules/prompt_parser.py (1.10) reads it.

(x) weighs 1.1, [x] 1 / 1.1, (x:1.3) 1.3; nesting multiplies; \( \) \[ \] \\ are text, another backslash vanishes;
a bracket that is never closed reaches to the end, one that was never opened is text; BREAK ends a chunk. BREAK within
brackets of another weight than 1 is a word there, and so it is here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sdxl_worker.errors import InvalidRequest

ROUND, SQUARE = 1.1, 1 / 1.1
BREAK, BREAK_WEIGHT = "BREAK", -1.0

# Possessive repeats give nothing back: with them each search takes time linear in the text.
_PART = re.compile(
    r"\\([()\[\]\\]?)|([()\[\]])|:\s*+([+-]?(?>\d++(?:\.\d*+)?|\.\d++))\s*+\)|[^\\()\[\]:]++|:",
)
_ESCAPED, _BRACKET, _NUMBER = 1, 2, 3
_BREAK = re.compile(r"\bBREAK\b")
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """Text that is tokenised together, and the weight of its tokens."""

    text: str
    weight: float = 1.0

    @property
    def is_break(self) -> bool:
        """True for what ends a chunk."""
        return self.text == BREAK and self.weight == BREAK_WEIGHT


@dataclass(frozen=True)
class Tag:
    """`text` is the whole <kind:body> as it was written; `kind` is lora, lyco or hypernet."""

    kind: str
    body: str
    text: str


@dataclass(frozen=True)
class ParsedPrompt:
    """At least one piece, which may be empty, and the tags in their order."""

    pieces: tuple[Piece, ...]
    tags: tuple[Tag, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True when the prompt is one text of weight 1."""
        return len(self.pieces) == 1 and self.pieces[0].weight == 1


def parse(text: str, syntax: str) -> ParsedPrompt:
    """The pieces of `text` under the syntax "plain" (one piece, no tags) or "a1111".

    Takes time linear in the text's length, whatever it holds. Raises InvalidRequest when a weight is not finite.
    """
    if syntax == "plain":
        return ParsedPrompt((Piece(text),))
    tags = tuple(Tag(match[1].lower(), match[2], match[0]) for match in _TAG.finditer(text))
    return ParsedPrompt(tuple(_merged(_weighted(_TAG.sub("", text)))), tags)


class _Brackets:
    """The brackets of one kind, by number. They nest among themselves only: in `(a [b) c]` both are around b."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        # Of each bracket its own factor and the one around it; 0 stands for none and is around all.
        self._factors, self._outer = [1.0], [0]
        self.innermost = 0

    def open(self) -> None:
        """Begin one around what follows."""
        self._outer.append(self.innermost)
        self.innermost = len(self._factors)
        self._factors.append(self._factor)

    def close(self, factor: float | None = None) -> bool:
        """End the innermost one, which weighs `factor` if that is given; False when none is open."""
        if not self.innermost:
            return False
        if factor is not None:
            self._factors[self.innermost] = factor
        self.innermost = self._outer[self.innermost]
        return True

    def products(self) -> list[float]:
        """Of each bracket its own factor times those of all around it, which were opened, and so come, before it."""
        products: list[float] = []
        for factor, outer in zip(self._factors, self._outer, strict=True):
            products.append(factor * products[outer] if products else factor)
        return products


def _weighted(text: str) -> Iterator[Piece]:
    """Every part of `text` that is not a bracket, with the product of what is around it."""
    round_ones, square_ones = _Brackets(ROUND), _Brackets(SQUARE)
    parts: list[tuple[str, float, int, int]] = []
    for match in _PART.finditer(text):
        part, group = match[0], match.lastindex
        if group == _BRACKET and part in "([":
            (round_ones if part == "(" else square_ones).open()
        elif (
            (part == ")" and round_ones.close())
            or (part == "]" and square_ones.close())
            or (group == _NUMBER and round_ones.close(float(match[_NUMBER])))
        ):
            continue
        elif group == _ESCAPED:
            parts.append((match[_ESCAPED], 1.0, round_ones.innermost, square_ones.innermost))
        else:
            for words, weight in _with_breaks(part):
                parts.append((words, weight, round_ones.innermost, square_ones.innermost))
    by_round, by_square = round_ones.products(), square_ones.products()
    for part, weight, within_round, within_square in parts:
        yield Piece(part, _rounded(weight * by_round[within_round] * by_square[within_square]))


def _with_breaks(text: str) -> Iterator[tuple[str, float]]:
    """Text and weight of what stands between the BREAKs, without the white space beside them, and of the BREAKs."""
    parts = _BREAK.split(text)
    for index, part in enumerate(parts):
        if index:
            yield BREAK, BREAK_WEIGHT
            part = part.lstrip()
        yield part.rstrip() if index < len(parts) - 1 else part, 1.0


def _rounded(weight: float) -> float:
    """To twelve digits: pieces of one weight belong together in whatever order their factors were multiplied."""
    if not math.isfinite(weight):
        raise InvalidRequest("holds a weight that is too large, or brackets that are nested too deeply")
    return float(f"{weight:.12g}")


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of one weight as one piece; one empty piece for none."""
    nothing = True
    for weight, group in itertools.groupby(pieces, key=lambda piece: piece.weight):
        nothing = False
        yield Piece("".join(piece.text for piece in group), weight)
    if nothing:
        yield Piece("")
