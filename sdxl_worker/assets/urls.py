"""Reading URLs from a request: what is refused, what is shown, and what tells two files apart."""

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from sdxl_worker.errors import BadReference
from sdxl_worker.masking import mask

# Query parameters that say who asks, not what is asked for; Azure's short names count only beside its `sig`.
_SECRET_PARAMETER = re.compile(
    r"(?i)(x-amz-.*|x-goog-.*|(access|auth|api|id|session)?[-_]?token|auth|authorization|api[-_]?key|apikey|secret"
    r"|password|passwd|pwd|sig|signature|expires|expiry|policy|key-pair-id|awsaccesskeyid|googleaccessid|hmac|jwt)"
)
_AZURE_PARAMETER = re.compile(r"(?i)s[vretpskir]|spr|sip|srt|sdd|sk(oid|tid|t|e|s|v)")


def canonical_url(url: str) -> str:
    """The URL without what does not name the file: case of the host, default port, fragment, tokens, signatures."""
    parts = urlsplit(url)
    port = {"http": 80, "https": 443}[parts.scheme.lower()]
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    origin = f"{parts.scheme.lower()}://{host}" + (f":{parts.port}" if parts.port not in (None, port) else "")
    query = urlencode(public_query(parts.query))
    return f"{origin}{parts.path or '/'}" + (f"?{query}" if query else "")


def split_http_url(url: str, error: Callable[[str], Exception] = BadReference) -> tuple[str, str, int]:
    """(scheme, host, port) of an http(s) URL without credentials; raises `error` with a sentence for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise error(f"the URL {mask(url)} has an invalid host or port") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise error(f"the URL {mask(url)} is neither http nor https")
    if not parts.hostname or port == 0:
        raise error(f"the URL {mask(url)} has an invalid host or port")
    if "@" in parts.netloc:
        raise error(f"the URL {mask(url)} holds a user name or password; use a signed URL or a token variable instead")
    return scheme, parts.hostname, port or {"http": 80, "https": 443}[scheme]


def public_query(query: str) -> list[tuple[str, str]]:
    """The query's parameters in order, without tokens and signatures."""
    pairs = parse_qsl(query, keep_blank_values=True)
    azure = any(name.lower() == "sig" for name, _ in pairs)
    return [
        (name, value)
        for name, value in pairs
        if not _SECRET_PARAMETER.fullmatch(name) and not (azure and _AZURE_PARAMETER.fullmatch(name))
    ]
