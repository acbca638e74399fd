"""Servers that answer wrongly, slowly, for ever, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from tests.hostile.case import SECRET, Case, job, noise, words
from tests.support.http_server import (
    Handler,
    Reply,
    chunked,
    cut,
    drip,
    drip_headers,
    endless,
    gzip_bomb,
    silent,
    status,
    whole,
)

Made = tuple[str, list[Reply]]
NUMBERS = (*words("-1 0 1 +5 1e400 abc 0x10 1,1 ١٢ 2147483648 18446744073709551616"), "", "9" * 30, "9" * 5000)
DATES = ("Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 99 Foo 2026", "Thu, 01 Jan 1970 00:00:00 GMT")
STATUSES = words("100 101 103 199 201 204 205 206 300 304 305 400 401 403 404 406 410 416 418 451 500 511 599 600 999")
LINES = (
    *("HTTP/1.1 abc x", "HTTP/9.9 200 OK", "ICY 200 OK", "HTTP/1.1", "", "x" * 100_000, "HTTP/1.1 200 OK\0"),
    *("\x16\x03\x01\x02", "HTTP/1.1 -5 x"),
)
TARGETS = (
    *("", "/", "//", "http://", "http://[", "?", "#x", "\\\\host\\x", "file:///etc/passwd", "ftp://a/b", "data:,x"),
    *("http://127.0.0.1:1/x", "http://[::1]:1/", "http://127.1:1/", "/hostile", "/hostile?" + "a" * 5000),
    *(f"http://bob:{SECRET}@127.0.0.1:1/", f"http://127.0.0.1:1/?sig={SECRET}", "x" * 70_000, "http://a:99999/"),
    *("javascript:1", "http://x.invalid/", "/\r\nX: y", "/%00", "/\x80"),
)
CHUNKS = (
    *(b"zz\r\nabc\r\n", b"-5\r\n", b"ffffffffffffffffff\r\nabc", b"3\r\nabc"),
    b"3;x=" + b"y" * 70_000 + b"\r\nabc\r\n0\r\n\r\n",
)


def raw(content: bytes) -> Reply:
    """These bytes instead of an answer."""
    return lambda handler: _write(handler, content)


def _write(handler: Handler, content: bytes) -> None:
    handler.wfile.write(content)


def _answer(code: str, headers: list[str], body: bytes = b"") -> Reply:
    lines = [f"HTTP/1.1 {code}", *headers, "Connection: close", "", ""]
    return raw("\r\n".join(lines).encode("utf-8", "surrogateescape") + body)


def _length(random: Random) -> Made:
    number = random.choice(NUMBERS)
    headers = [f"Content-Length: {number}"] * random.choice((1, 1, 2))
    return f"Content-Length {number[:20]}", [_answer("200 OK", headers, noise(random, 100))]


def _range(random: Random) -> Made:
    first, last, total = (random.choice(NUMBERS) for _ in range(3))
    value = random.choice((f"bytes {first}-{last}/{total}", f"bytes */{total}", f"{first}", "bytes", f"bytes 0-{last}"))
    content = noise(random, 4000)
    partial = _answer("206 Partial Content", [f"Content-Range: {value}", "Content-Length: 100"], content[:100])
    return f"Content-Range {value[:40]}", [cut(content, 2000, etag='"a"'), partial, partial]


def _wait(random: Random) -> Made:
    value = random.choice((*NUMBERS, *DATES))
    code = random.choice(("429 Too Many", "503 Busy", "302 Found"))
    return f"Retry-After {value[:30]}", [_answer(code, [f"Retry-After: {value}", "Content-Length: 0"])]


def _status(random: Random) -> Made:
    code = random.choice(STATUSES)
    return f"status {code}", [_answer(f"{code} x", ["Content-Length: 3"], b"abc")]


def _line(random: Random) -> Made:
    line = random.choice(LINES)
    return f"status line {line[:20]!r}", [raw(line.encode() + b"\r\n\r\nabc")]


def _headers(random: Random) -> Made:
    header = random.choice(
        (
            "X: " + "x" * 70_000,
            "Content-Encoding: gzip",
            "Content-Encoding: br, gzip, deflate",
            "Transfer-Encoding: gzip, chunked",
            "ETag: " + "e" * 9000,
            "ETag: \x80\xff",
            'Content-Disposition: attachment; filename="../../etc/passwd"',
            "Content-Type: text/html; charset=\x00",
            "Set-Cookie: " + "a=b; " * 5000,
            "no colon here",
            ": no name",
            "Last-Modified: " + "9" * 3000,
            "Strict-Transport-Security: max-age=99999999",
            "Link: <http://169.254.169.254/>; rel=next",
        )
    )
    many = [f"X-{index}: y" for index in range(random.choice((0, 0, 150, 20_000)))]
    return f"header {header[:30]!r}", [_answer("200 OK", [header, *many, "Content-Length: 3"], b"abc")]


def _location(random: Random) -> Made:
    target = random.choice(TARGETS)
    headers = [f"Location: {target}", *(["Location: /other"] if random.random() < 0.2 else []), "Content-Length: 0"]
    code = random.choice(("301 x", "302 x", "303 x", "307 x", "308 x", "300 x"))
    return f"redirect to {target[:40]!r}", [_answer(code, headers)]


def _cut(random: Random) -> Made:
    content = noise(random, 9000)
    replies = [
        cut(content, random.choice((0, 1, 8999)), etag=random.choice(("", '"a"')), reset=random.random() < 0.5)
        for _ in range(random.choice((1, 2, 3)))
    ]
    return "cut", [*replies, random.choice((replies[0], whole(noise(random, 9000), etag='"b"'), status(404)))]


def _chunks(random: Random) -> Made:
    content = noise(random, 50)
    if random.random() < 0.5:
        return "chunked", [chunked(content, complete=random.random() < 0.5)]
    return "odd chunks", [_answer("200 OK", ["Transfer-Encoding: chunked"], random.choice(CHUNKS))]


def _large(random: Random) -> Made:
    name, reply = random.choice(
        (
            ("endless", endless),
            ("gzip bomb", gzip_bomb(50_000_000)),
            ("announces 10**12", _answer("200 OK", ["Content-Length: 1000000000000"], b"abc")),
            ("40 MB", whole(bytes(40_000_000))),
            ("40 MB of unknown length", whole(bytes(40_000_000), length=False)),
        )
    )
    return name, [reply]


def _slow(random: Random) -> Made:
    slow = {"drip": drip(bytes(10**6)), "headers drip": drip_headers(), "silent": silent, "late": drip(b"abc", 0.3)}
    name = random.choice(list(slow))
    return name, [slow[name]]


def _page(random: Random) -> Made:
    body = random.choice(
        (
            b"<!DOCTYPE html><html><title>Sign in</title></html>",
            json.dumps({"error": "x" * 1000}).encode(),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"",
            b"PK\x03\x04" + noise(random, 50),
            b"[" * 100_000,
        )
    )
    return f"page {body[:12]!r}", [whole(body)]


_KINDS: tuple[tuple[float, Callable[[Random], Made]], ...] = (
    (4, _length),
    (3, _range),
    (2, _wait),
    (4, _status),
    (2, _line),
    (4, _headers),
    (5, _location),
    (3, _cut),
    (3, _chunks),
    (2, _large),
    (0.5, _slow),
    (2, _page),
)


def make(random: Random, host: str) -> Case:
    """One server, asked for a LoRA by URL or through the Hub's or Civitai's API, or for the input picture."""
    (kind,) = random.choices([kind for _, kind in _KINDS], [weight for weight, _ in _KINDS])
    what, replies = kind(random)
    asked = random.choice(("lora", "lora", "pt", "picture", "hub", "civitai"))
    if asked == "picture":
        return Case(f"picture: {what}", job(image_url=f"{host}/hostile"), {"/hostile": replies})
    if asked in ("hub", "civitai"):
        reference = random.choice(_API_REFERENCES[asked])
        return Case(f"{reference}: {what}", job(loras=[reference]), {"*": replies})
    url = f"{host}/hostile{random.choice(('', '.safetensors'))}" if asked == "lora" else f"{host}/hostile.pt"
    return Case(f"{asked}: {what}", job(loras=[url]), {url.removeprefix(host): replies})


_API_REFERENCES = {
    "hub": ("user/repo", "user/repo/x.safetensors", "user/repo@v1/sub"),
    "civitai": ("civitai:1@2", "civitai:1", "https://civitai.com/api/download/models/2"),
}
