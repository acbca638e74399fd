"""Reading URLs from a request: what is refused, and what tells two files apart."""

import re
from collections.abc import Callable, Iterable
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from sdxl_worker.errors import BadReference
from sdxl_worker.masking import mask

_DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_HOST = 253  # RFC 1035

_AWS = r"x-amz-[a-z\d\-]+|awsaccesskeyid|signature|expires"
_GOOGLE = r"x-goog-[a-z\d\-]+|googleaccessid"
_AZURE = r"s[vretpskir]|sig|spr|sip|srt|sdd|sk(oid|tid|t|e|s|v)"
_CLOUDFRONT = r"policy|key-pair-id"
# Hosts whose documentation says which query parameters sign a request, whatever file it is for. At any other host
# every parameter may choose the file: a token in one place is a file's name in another.
_SIGNATURES = tuple(
    (re.compile(hosts), re.compile(rf"(?i){parameters}"))
    for hosts, parameters in (
        (r"(^|\.)s3([.\-][a-z\d.\-]*)?\.amazonaws\.com(\.cn)?$", _AWS),
        (r"\.r2\.cloudflarestorage\.com$", _AWS),
        (r"(^|\.)storage\.googleapis\.com$", f"{_AWS}|{_GOOGLE}"),
        (r"\.blob\.core\.windows\.net$", _AZURE),
        (r"(^|\.)(huggingface\.co|hf\.co)$", f"{_AWS}|{_CLOUDFRONT}"),
        (r"(^|\.)civitai\.com$", f"{_AWS}|token|authorization"),
    )
)


def split_http_url(url: str, error: Callable[[str], Exception] = BadReference) -> tuple[str, str, int]:
    """(scheme, host, port) of an http(s) URL without credentials; raises `error` with a sentence for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise error(f"the URL {mask(url)} has an invalid host or port") from None
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise error(f"the URL {mask(url)} is neither http nor https")
    if not parts.hostname or len(parts.hostname) > MAX_HOST or re.search(r"[%\s]", parts.hostname) or port == 0:
        raise error(f"the URL {mask(url)} has an invalid host or port")
    if "@" in parts.netloc:
        raise error(f"the URL {mask(url)} holds a user name or password; use a signed URL or a token variable instead")
    return scheme, parts.hostname, port or _DEFAULT_PORTS[scheme]


def canonical_url(url: str) -> str:
    """The URL without what does not name the file: case of the host, default port, fragment, known signatures.

    It may hold a token: it is for hashing only. Queries that are equal as form data (`a+b` and `a%20b`) are equal.
    """
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    is_default = parts.port in (None, _DEFAULT_PORTS[parts.scheme.lower()])
    origin = f"{parts.scheme.lower()}://{host}" + ("" if is_default else f":{parts.port}")
    query = encode_query(naming_query(parts))
    return f"{origin}{parts.path or '/'}" + (f"?{query}" if query else "")


def naming_query(parts: SplitResult) -> list[tuple[str, str]]:
    """The query's parameters that may choose the file, in order: all but the signature of a host that is known.

    Bytes that are not UTF-8 become half surrogates, which `encode_query` turns back.
    """
    pairs = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    host = parts.hostname or ""
    signatures = [parameters for hosts, parameters in _SIGNATURES if hosts.search(host)]
    return [pair for pair in pairs if not any(signature.fullmatch(pair[0]) for signature in signatures)]


def encode_query(pairs: Iterable[tuple[str, str]]) -> str:
    """Parameters as `naming_query` gives them, as the query of a URL."""
    return urlencode(list(pairs), errors="surrogateescape")
