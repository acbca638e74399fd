"""Prompts as AUTOMATIC1111 reads them."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import Any

import pytest
from diffusion_prompt_embedder.core.parser import parse_prompt_attention

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.parse import Tag, parse

PARTS = [
    "cat",
    " dog",
    ", ",
    "(",
    "(",
    "[",
    ")",
    ")",
    "]",
    ":1.3)",
    ": 0.5 )",
    ":-2)",
    ":0)",
    ":",
    "\\(",
    "\\]",
    "\\\\",
]
PARTS += ["\\x", " BREAK ", "BREAK", "\n", "é", ":.7)", ":+2.)", " a BREAK b "]


def pieces(text: str) -> list[tuple[str, Any]]:
    return [(piece.text, pytest.approx(piece.weight)) for piece in parse(text, "a1111").pieces]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("((x:1.3) y)", [("x", 1.43), (" y", 1.1)]),
        ("([x])", [("x", 1)]),
        ("(x:0)(y:-1.5)(z: .5 )", [("x", 0), ("y", -1.5), ("z", 0.5)]),
        (r"\(a\) \[b\] \\ c\d", [("(a) [b] \\ cd", 1)]),
        ("((a", [("a", 1.21)]),
        ("a) ] b :1.2)", [("a) ] b :1.2)", 1)]),
        ("[a:1.2)", [("a:1.2)", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("a  BREAK\nBREAK b", [("a", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("b", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("(a BREAK b:1.3)", [("a", 1.3), ("BREAK", -1.3), ("b", 1.3)]),
    ],
)
def test_pieces_and_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize("seed", range(200))
def test_a_port_of_the_original_reads_the_same(seed: int) -> None:
    chosen = random.Random(seed)
    text = "".join(chosen.choices(PARTS, k=chosen.randint(1, 25)))
    # The original keeps pieces apart whose weights differ in the sixteenth digit.
    rounded = [(str(part), float(f"{weight:.12g}")) for part, weight in parse_prompt_attention(text)]
    runs = itertools.groupby(rounded, key=lambda piece: piece[1])
    expected = [("".join(part for part, _ in run), pytest.approx(weight)) for weight, run in runs]
    assert pieces(text) == expected, text


def test_plain_text_is_one_piece() -> None:
    parsed = parse("(a:1.2) BREAK <lora:x:1>", "plain")
    assert [(piece.text, piece.weight) for piece in parsed.pieces] == [("(a:1.2) BREAK <lora:x:1>", 1)]
    assert parsed.tags == ()


def test_tags_are_taken_out_of_the_text() -> None:
    text = "a <lora:https://x.test/y.safetensors:0.5:1>(b:1.2)<LyCO:z>, <hypernet:h:1> <3 <s0> <other:1>"
    parsed = parse(text, "a1111")
    assert "".join(piece.text for piece in parsed.pieces) == "a b,  <3 <s0> <other:1>"
    assert parsed.tags == (
        Tag("lora", "https://x.test/y.safetensors:0.5:1", "<lora:https://x.test/y.safetensors:0.5:1>"),
        Tag("lyco", "z", "<LyCO:z>"),
        Tag("hypernet", "h:1", "<hypernet:h:1>"),
    )


@pytest.mark.parametrize("text", ["(a:" + "9" * 400 + ")", "(" * 8000 + "a"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="weight that is too large"):
        parse(text, "a1111")


def test_deep_nesting_keeps_its_weight() -> None:
    (piece,) = parse("(" * 300 + "a" + ")" * 300, "a1111").pieces
    assert piece.weight == pytest.approx(math.exp(300 * math.log(1.1)))


HOSTILE = {
    "open": "(" * 100_000,
    "both kinds": "([" * 50_000,
    "nested": "(" * 50_000 + ")" * 50_000,
    "with text": "(a" * 7_000 + ")" * 86_000,
    "pairs": "(a)[b]" * 17_000,
    "closed": ")]" * 50_000,
    "spaces": "a" + " " * 100_000 + "b",
    "digits": "(a:" + "1" * 100_000,
    "points": "(a:" + "1." * 50_000 + ")",
    "colons": ":" + " " * 50_000 + "1" + " " * 50_000,
    "backslashes": "\\" * 100_000,
    "breaks": " BREAK " * 15_000,
    "tags": "<lora:" * 17_000,
    "tag of colons": "<lora:" + ":" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts_take_linear_time(name: str) -> None:
    """About 50 ms each; what is quadratic in 100,000 takes minutes."""
    started = time.process_time()
    assert parse(HOSTILE[name], "a1111").pieces
    assert time.process_time() - started < 20
