"""What may be shown of a reference or a URL: nothing that may be a password, a token or a signature.

Every pattern is linear: the texts come from outside and may be made to slow a pattern down.
"""

import re

from sdxl_worker.text import as_unicode, ascii_line

# More than the longest reference that is accepted.
MAX_READ = 8192

_PLAIN_URL = re.compile(
    r"(?is)(?P<scheme>https?://)(?P<user>[^/?#@\\]*@)?"
    r"(?P<host>(?:[a-z0-9._\-]{1,253}|\[[0-9a-f:.]{2,45}\])(?P<port>:[0-9]{1,5})?)(?P<path>/[^?#]*)?(?P<rest>[?#].*)?"
)
# Other texts in which a colon or an @ hides nothing: a revision of a Hub repo, a Civitai model.
_PLAIN_NAME = re.compile(
    r"(?ia)[\w.\-]+/[\w.\-]+@[\w.\-/ ]+|(?:civitai|urn:air:[\w.\-]+:[\w.\-]+:civitai):\d+(?:@\d+)?(?:\.\w+)?"
)
_SCHEME = re.compile(r"(?i)(?:https?|ftp|file|civitai|urn):/{0,3}")
_SUSPICIOUS = re.compile(r"[:@?#%]")
# A query that lost its question mark, or had it encoded.
_HIDDEN_QUERY = re.compile(r"(?i)%3f|%23|[&;][\w.\-]{1,64}=")
_QUERY = re.compile(r"(?i)\?|%3f|[&;][\w.\-]{1,64}=")

_URL_IN_TEXT = re.compile(r"(?i)\bhttps?:[^\s'\"<>]*")
_LOGIN_IN_TEXT = re.compile(r"(?i)(?<!civitai):[^\s:/@'\"]+@")
_QUERY_IN_TEXT = re.compile(r"\?[\w.\-%]{1,64}=[^\s'\"<>)\]]*")


def mask(text: str) -> str:
    """A reference or URL as it may be shown: one ASCII line of at most 200 letters, without query, fragment and login.

    What is neither a plain URL nor a plain name ends at the first `:`, `@`, `?`, `#` or `%` after its scheme.
    """
    text = text[:MAX_READ]
    found = _plain_url(text)
    if found is not None:
        shown = found["scheme"] + found["host"] + (found["path"] or "")
    elif _PLAIN_NAME.fullmatch(text):
        shown = text
    else:
        shown = _beginning(text)
    return ascii_line(_HIDDEN_QUERY.split(shown, maxsplit=1)[0])


def has_query(text: str) -> bool:
    """True for a text that holds a query, perhaps encoded or without its question mark: a token may be in it."""
    return _QUERY.search(text) is not None


def mask_urls(text: str) -> str:
    """A text of several words with `***` for logins, queries and fragments, in URLs and in what looks like one."""
    text = _URL_IN_TEXT.sub(lambda found: _masked_url(found[0]), text)
    text = _QUERY_IN_TEXT.sub("?***", _LOGIN_IN_TEXT.sub(":***@", text))
    return as_unicode(text)


def _masked_url(text: str) -> str:
    url = text.rstrip(")].,;:")
    found = _plain_url(url)
    if found is None:
        beginning = _beginning(url)
        masked = beginning if beginning == url else f"{beginning}***"
    else:
        login = "***@" if found["user"] else ""
        path = _HIDDEN_QUERY.split(found["path"] or "", maxsplit=1)
        rest = "?***" if found["rest"] or len(path) > 1 else ""
        masked = found["scheme"] + login + found["host"] + path[0] + rest
    return masked + text[len(url) :]


def _plain_url(text: str) -> re.Match[str] | None:
    """The parts of an http(s) URL that can be read in one way only."""
    found = _PLAIN_URL.fullmatch(text)
    if found is None or int((found["port"] or ":0")[1:]) > 65535:
        return None
    # http://name:12?34@host: what looks like a port may be the beginning of a password.
    is_login = found["port"] and not found["path"] and "@" in (found["rest"] or "")
    return None if is_login else found


def _beginning(text: str) -> str:
    scheme = _SCHEME.match(text)
    begin = scheme.end() if scheme is not None else 0
    end = _SUSPICIOUS.search(text, begin)
    return text[: end.start()] if end is not None else text
