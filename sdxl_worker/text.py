"""Text from outside - requests, file names, metadata, errors - made fit to be sent on, logged or shown."""

from __future__ import annotations

import re
from typing import Any

# What would break a line, or turn the direction of writing in what is shown.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_NOT_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9._\-]+")


def is_unicode(text: str) -> bool:
    """True when `text` can be encoded: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_clean(text: str) -> bool:
    """True when `text` can be sent on as UTF-8 and holds no NUL."""
    return "\0" not in text and is_unicode(text)


def as_unicode(text: str) -> str:
    """`text` with a question mark for every half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_text(value: object, limit: int = 200) -> str:
    """One line of printable characters, at most `limit` of them; empty for what is not a text."""
    if not isinstance(value, str):
        return ""
    return " ".join(_UNPRINTABLE.sub(" ", value[: 4 * limit]).split())[:limit]


def ascii_line(text: str, limit: int = 200) -> str:
    """One line of at most `limit` printable ASCII characters, with a question mark for every other."""
    text = text[: limit + 1].encode("ascii", "replace").decode()
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def safe_name(text: str, limit: int = 80) -> str:
    """`text` as a file name of at most `limit` ASCII characters that no system reads in another way; empty for none."""
    return _NOT_IN_FILE_NAMES.sub("_", text[: 4 * limit]).strip("._")[:limit].rstrip("._")


def shown(value: Any) -> str:
    """A short ASCII form of a caller's value, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number that large"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
