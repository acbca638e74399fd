"""Text from outside, made fit to be sent on or shown."""

import math

import pytest

from sdxl_worker.text import as_unicode, clean_text, is_clean, is_unicode, safe_name, shown


@pytest.mark.parametrize(
    ("text", "unicode", "clean"),
    [("", True, True), ("Grüße \U0001f600", True, True), ("a\0b", True, False), ("a\ud800", False, False)],
)
def test_what_can_be_sent_on(text, unicode, clean):
    assert (is_unicode(text), is_clean(text)) == (unicode, clean)


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert as_unicode("half \ud800 pair \udfff, \U0001f600") == "half ? pair ?, \U0001f600"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("  a\n\tb\0c  ", "a b c"),
        ("left \u202eright\u2066 \ud800x", "left right x"),
        ("\x9b31mred", "31mred"),
        ("Grüße \U0001f600", "Grüße \U0001f600"),
        (42, ""),
        (None, ""),
        ("x" * 500, "x" * 200),
        (" " * 10_000 + "late", ""),
    ],
)
def test_one_line_of_printable_characters(value, expected):
    assert clean_text(value) == expected


def test_a_line_of_a_given_length():
    assert clean_text("abcdef", limit=3) == "abc"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1.5, "1.5"),
        (math.nan, "nan"),
        (2**127, "170141183460469231731687303715884105728"),
        pytest.param(10**5000, "a number that large", id="5,001 digits"),
        ("ü\ud800", r"'\xfc\ud800'"),
        ({"a": 1}, "an object"),
        ([1], "a list"),
        ("x" * 10**6, "'" + "x" * 60 + "'"),
        ("\U0001f600" * 60, "'" + r"\U0001f600" * 7 + r"\U0001" + "..."),
    ],
)
def test_a_callers_value_in_a_sentence(value, expected):
    assert shown(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("my-lora_v1.2.safetensors", "my-lora_v1.2.safetensors"),
        ("my style", "my_style"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\x\0.pt", "C_x_.pt"),
        (".hidden.", "hidden"),
        ("Gr\xfc\xdfe\ud800", "Gr_e"),
        ("x" * 79 + ".y", "x" * 79),
        ("?" * 10_000, ""),
        ("..", ""),
    ],
)
def test_a_name_for_a_file(value, expected):
    assert safe_name(value) == expected
    assert safe_name(expected) == expected
