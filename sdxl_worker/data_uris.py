"""Pictures that a request brings along: data URIs in base64 (RFC 2397)."""

from __future__ import annotations

import base64
import binascii
import re

# Of one picture, fetched or brought along.
MAX_PICTURE_BYTES = 32 << 20
# Four characters for three bytes, and a line break after every 76 of them, as MIME's encoders write it.
_MAX_CHARACTERS = MAX_PICTURE_BYTES // 3 * 4 * 78 // 76
# The type that it claims is not looked at: what the bytes are is seen when they are unpacked.
_HEADER = re.compile(r"data:[^,;]{0,200}(?:;[^,;]{0,200}){0,4};base64,", re.IGNORECASE | re.ASCII)
_WHITE = b"\r\n\t "


def is_data_uri(text: str) -> bool:
    """True for what claims to be one, well formed or not."""
    return text[:5].lower() == "data:"


def problem(text: str) -> str | None:
    """What can be said against a data URI without decoding it, to be read after the field's name, or None."""
    if not _HEADER.match(text):
        return "must be a data URI in base64 (data:image/png;base64,...)"
    if len(text) > _MAX_CHARACTERS:
        return f"must hold at most {MAX_PICTURE_BYTES} bytes"
    return None


def decoded(text: str) -> bytes:
    """The bytes of a data URI without `problem`; raises ValueError, to be read after the field's name.

    Line breaks are left out, and nothing else is forgiven.
    """
    header = _HEADER.match(text)
    assert header is not None
    try:
        data = base64.b64decode(text[header.end() :].encode("ascii").translate(None, _WHITE), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("is not well-formed base64") from None
    if len(data) > MAX_PICTURE_BYTES:
        raise ValueError(f"must hold at most {MAX_PICTURE_BYTES} bytes")
    return data
