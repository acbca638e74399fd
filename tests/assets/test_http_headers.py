"""Headers that are beyond any sense are numbers that are too large, or none."""

from __future__ import annotations

import email.utils
import time

import pytest

from sdxl_worker.assets.http_headers import content_length, content_range, retry_after

NINES = "9" * 5000  # int() refuses more than 4,300 digits with a ValueError
FAR = 10**18


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("12", 12), (NINES, FAR), ("", None), ("-1", None), ("1.5", None), ("5, 5", None), ("\u0661", None)],
)
def test_content_length(text: str, expected: int | None):
    assert content_length({"Content-Length": text}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 5-9/10", (5, 10)),
        ("bytes 5-9/*", (5, None)),
        (f"bytes {NINES}-{NINES}/{NINES}", (FAR, FAR)),
        ("bytes */10", (-1, None)),
        ("lines 5-9/10", (-1, None)),
        ("bytes \u0661-9/10", (-1, None)),
        ("", (-1, None)),
    ],
)
def test_content_range(text: str, expected: tuple[int, int | None]):
    assert content_range(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3.0),
        (NINES, 1e18),
        ("-3", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        (f"Fri, {NINES} Dec 2030 23:59:59 GMT", None),
        ("Fri, 31 Dec 2030 23:59:59 +9999999999999999999999", None),
    ],
)
def test_retry_after(text: str, expected: float | None):
    assert retry_after({"Retry-After": text}) == expected


def test_retry_after_a_date():
    in_an_hour = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert 3000 < (retry_after({"Retry-After": in_an_hour}) or 0) <= 3600
