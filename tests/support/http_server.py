"""A file server on loopback that misbehaves on request, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler"], None]


@dataclass(frozen=True)
class Request:
    """One request as it arrived; header names in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str] = field(repr=False)


class Handler(BaseHTTPRequestHandler):
    """Looks the path up in the server's table; a list of replies is used up one per request, the last one stays."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.requests.append(Request(self.command, path, query, headers))
            replies = self.server.replies.get(path, [status(404)])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has seen enough
            reply(self)

    do_HEAD = do_GET

    def start(self, code: int = 200, **headers: object) -> None:
        """Status line and headers; `content_length` becomes Content-Length."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-").title(), str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


class FileServer(ThreadingHTTPServer):
    """A context manager; `replies` maps a path to what happens there."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[Request] = []
        self.replies: dict[str, list[Reply]] = {}
        self.stopping = threading.Event()
        self.connections = 0
        self._thread = threading.Thread(target=lambda: self.serve_forever(poll_interval=0.02), daemon=True)

    def get_request(self) -> tuple[socket.socket, Any]:
        accepted = super().get_request()
        self.connections += 1
        return accepted

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is not an error of the test."""

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, path: str, *replies: Reply) -> str:
        """Serve `replies` at `path`; gives the URL."""
        self.replies[path] = list(replies)
        return self.origin + path

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        """The requests that came for `path`."""
        return [request for request in self.requests if (request.path, request.method) == (path, method)]

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


def whole(content: bytes, *, etag: str = "", ranges: bool = True, modified: str = "", length: bool = True) -> Reply:
    """A well-behaved file, with Range and If-Range where `ranges`."""

    def reply(handler: Handler) -> None:
        headers: dict[str, object] = {}
        if etag:
            headers["etag"] = etag
        if modified:
            headers["last_modified"] = modified
        found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        current = handler.headers.get("If-Range") in (None, etag or modified)
        if found and ranges and current:
            start = int(found[1])
            headers["content_range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.start(206, content_length=len(content) - start, **headers)
            handler.wfile.write(content[start:])
            return
        if length:
            headers["content_length"] = len(content)
        handler.start(200, **headers)
        if handler.command != "HEAD":
            handler.wfile.write(content)

    return reply


def status(code: int, body: bytes = b"", **headers: object) -> Reply:
    """An answer without a file."""

    def reply(handler: Handler) -> None:
        handler.start(code, **{"content_length": len(body), **headers})
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return reply


def redirect(location: str, code: int = 302) -> Reply:
    """A redirect; an empty `location` leaves the header out."""

    def reply(handler: Handler) -> None:
        handler.start(code, content_length=0, **({"location": location} if location else {}))

    return reply


def cut(content: bytes, after: int, *, etag: str = "", reset: bool = False) -> Reply:
    """Announces the whole file, sends `after` bytes of what is asked for and hangs up, rudely with `reset`."""

    def reply(handler: Handler) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(found[1]) if found and etag else 0
        headers: dict[str, object] = {"etag": etag} if etag else {}
        if start:
            headers["content_range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.start(206 if start else 200, content_length=len(content) - start, **headers)
        handler.wfile.write(content[start : start + after])
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    return reply


def chunked(content: bytes, *, complete: bool = True) -> Reply:
    """Chunked transfer encoding; without its last chunk unless `complete`."""

    def reply(handler: Handler) -> None:
        handler.start(200, transfer_encoding="chunked")
        handler.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        if complete:
            handler.wfile.write(b"0\r\n\r\n")

    return reply


def drip(content: bytes, interval_s: float = 0.05) -> Reply:
    """One byte at a time, for as long as anybody listens."""

    def reply(handler: Handler) -> None:
        handler.start(200, content_length=len(content))
        for index in range(len(content)):
            if handler.server.stopping.wait(interval_s):
                return
            handler.wfile.write(content[index : index + 1])

    return reply


def drip_headers(interval_s: float = 0.05) -> Reply:
    """A header line that never ends: no single read ever times out."""

    def reply(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not handler.server.stopping.wait(interval_s):
            handler.wfile.write(b"a")

    return reply


def silent(handler: Handler) -> None:
    """Accepts, and never says a word."""
    handler.server.stopping.wait()


def held(content: bytes, first: int, release: threading.Event, reached: threading.Event) -> Reply:
    """Sends `first` bytes, tells `reached`, and the rest once `release` is set."""

    def reply(handler: Handler) -> None:
        handler.start(200, content_length=len(content))
        handler.wfile.write(content[:first])
        handler.wfile.flush()
        reached.set()
        while not release.wait(0.05):
            if handler.server.stopping.is_set():
                return
        handler.wfile.write(content[first:])

    return reply


def gzip_bomb(inflated: int) -> Reply:
    """A small body that inflates to `inflated` bytes, sent whether the client accepts gzip or not."""
    body = gzip.compress(bytes(inflated))

    def reply(handler: Handler) -> None:
        handler.start(200, content_length=len(body), content_encoding="gzip")
        handler.wfile.write(body)

    return reply


def endless(handler: Handler) -> None:
    """No Content-Length, and no end."""
    handler.start(200)
    while not handler.server.stopping.is_set():
        handler.wfile.write(bytes(65536))


def slowly(content: bytes, pieces: int, pause_s: float) -> Reply:
    """The whole file, in `pieces` with a pause between them."""

    def reply(handler: Handler) -> None:
        handler.start(200, content_length=len(content))
        step = -(-len(content) // pieces)
        for start in range(0, len(content), step):
            handler.wfile.write(content[start : start + step])
            handler.server.stopping.wait(pause_s)

    return reply


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()
