"""The few HTTP headers that a download needs (RFC 9110); a value without sense reads as none."""

import email.utils
import re
import time
from collections.abc import Mapping

# No file and no wait is that large; int() and float() fail for texts that are far longer.
FAR = 10**18


def content_length(headers: Mapping[str, str]) -> int | None:
    """The announced number of bytes, at most FAR; None when there is none."""
    return _number(headers.get("Content-Length", ""))


def content_range(text: str) -> tuple[int, int | None]:
    """(first byte, whole length or None) of a Content-Range header; (-1, None) for what is none."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    start = _number(span.partition("-")[0])
    return (start, _number(total)) if unit == "bytes" and start is not None else (-1, None)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the host asks to wait (a number or a date), at most FAR; None when it does not say."""
    text = headers.get("Retry-After", "").strip()
    if (seconds := _number(text)) is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def validator(headers: Mapping[str, str]) -> str:
    """What If-Range takes: a strong ETag, else Last-Modified; "" when the server offers neither."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _number(text: str) -> int | None:
    if not re.fullmatch(r"[0-9]+", text):
        return None
    return int(text) if len(text) <= 18 else FAR
