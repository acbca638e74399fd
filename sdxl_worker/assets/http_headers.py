"""The few HTTP headers that resuming and retrying need (RFC 9110)."""

import email.utils
import time
from collections.abc import Mapping


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the host asks to wait (a number or a date), None when it does not say."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def content_range(text: str) -> tuple[int, int | None]:
    """(first byte, whole length or None) of a Content-Range header; (-1, None) for what is none."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    start = span.partition("-")[0]
    if unit != "bytes" or not start.isdecimal():
        return -1, None
    return int(start), int(total) if total.isdecimal() else None


def validator(headers: Mapping[str, str]) -> str:
    """What If-Range takes: a strong ETag, else Last-Modified; "" when the server offers neither."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
