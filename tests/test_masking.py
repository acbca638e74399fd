"""What is shown of references and URLs, well-formed and malformed (fault list: no secret in answer or log)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdxl_worker.masking import mask, mask_urls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a", "https://host/a"),
        ("HTTPS://Host.example:8443/a%20b/c.safetensors", "HTTPS://Host.example:8443/a%20b/c.safetensors"),
        ("https://host:80/@a/b", "https://host:80/@a/b"),
        ("http://[2001:db8::1]:80/a", "http://[2001:db8::1]:80/a"),
        ("https://user:pw@host/a?token=x#y", "https://host/a"),
        ("https://host/a%3Ftoken=x", "https://host/a"),
        ("https://host/a&token=x", "https://host/a"),
        ("user/repo@refs/pr/3/file.pt", "user/repo@refs/pr/3/file.pt"),
        ("civitai:5@7", "civitai:5@7"),
        ("urn:air:sdxl:lora:civitai:5@7", "urn:air:sdxl:lora:civitai:5@7"),
        ("a file.safetensors", "a file.safetensors"),
        ("a\nb\x1b[31m\u00fc", "a?b?[31m?"),
    ],
)
def test_a_plain_reference_is_shown(text: str, expected: str):
    assert mask(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://bob:PW?x@host", "http://bob"),
        ("http://bob:PW#x@host", "http://bob"),
        ("http://bob:12?x@host", "http://bob"),
        ("http://bob:123456", "http://bob"),
        ("http://bob:P/W@host/a", "http://bob"),
        (r"http://bob:PW\@host", "http://bob"),
        ("http://a:PW@b:PW@host/", "http://a"),
        ("bob:PW@host/x", "bob"),
        ("https:bob:PW@host", "https:bob"),
        ("https:/bob:PW@host", "https:/bob"),
        ("http://u%3aPW%40h/x", "http://u"),
        ("x?token=PW", "x"),
        ("x&token=PW", "x"),
        ("x#PW", "x"),
        ("ftp://bob:PW@host/x", "ftp://bob"),
        ("x://bob:PW@host", "x"),
        ("see http://bob:PW@host", "see http"),
        ("http://host:port/x", "http://host"),
        ("civitai:1@2?token=PW", "civitai:1"),
    ],
)
def test_what_is_malformed_ends_before_a_secret_may_begin(text: str, expected: str):
    assert mask(text) == expected


def test_what_is_shown_has_a_bound():
    assert mask("x" * 1000) == "x" * 197 + "..."
    assert mask("https://host/" + "x" * 100_000) == "https://host/" + "x" * 184 + "..."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("get https://a.b/c?token=x&y=1 now", "get https://a.b/c?*** now"),
        ("'https://user:word@a.b/c'", "'https://***@a.b/c'"),
        ("(https://a.b/c#frag)", "(https://a.b/c?***)"),
        ("at https://a.b/c.", "at https://a.b/c."),
        ("http://bob:PW?x@host", "http://bob***"),
        ("at http://bob:PW#x@host, again", "at http://bob***, again"),
        ("from bob:PW@host/x", "from bob:***@host/x"),
        ("https:bob:PW@host", "https:bob***"),
        ("x?token=PW&y=1 failed", "x?*** failed"),
        ("http://u%3aPW%40h/x", "http://u***"),
        ("what? no URL", "what? no URL"),
        ("civitai:5@7", "civitai:5@7"),
        ("12:30:01 https: no", "12:30:01 https: no"),
        ("half \ud800 pair", "half ? pair"),
    ],
)
def test_urls_in_a_text_lose_their_secrets(text: str, expected: str):
    assert mask_urls(text) == expected


# The letters of which the patterns are made, in the combinations that make careless ones try over and over.
PIECES = (
    "//",
    "/",
    "@",
    ":",
    "a:",
    "a@",
    "?",
    "?a=",
    "%3f",
    "%",
    "&a",
    ";",
    "http:",
    "http://",
    "https://a",
    "[",
    "]",
    ")",
    "a/a@",
)
HOSTILE = f"""
from sdxl_worker.masking import mask, mask_urls
for piece in {PIECES!r}:
    for start in ("", "x://a:b", "http://", "http://a:b", "urn:air:", "a/b@"):
        for end in ("", "@", "?", "\\n", " "):
            text = start + piece * (131072 // len(piece)) + end
            mask(text), mask_urls(text)
"""


def test_hostile_texts_take_linear_time():
    # 570 texts of 128 KB: about 5 s on one slow core, where one pattern that is not linear takes 30 s for one text.
    subprocess.run([sys.executable, "-c", HOSTILE], check=True, timeout=300)
