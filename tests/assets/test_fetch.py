"""The fetch against servers that misbehave: fault rows 18 and 21 to 30."""

from __future__ import annotations

import contextlib
import email.utils
import io
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from sdxl_worker import errors
from sdxl_worker.assets import connect, fetch
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import fetch_bytes, fetch_to
from tests.support import http_server as on
from tests.support.http_server import FileServer

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def get(url: str, *, seconds: float = 20.0, max_bytes: int = 1 << 24, **headers: str) -> bytes:
    sink = io.BytesIO()
    fetched = fetch_to(sink, Target(url, headers), max_bytes=max_bytes, budget=Budget.start(seconds))
    assert (fetched.size, fetched.sha256) == (len(sink.getvalue()), on.sha256(sink.getvalue()))
    return sink.getvalue()


@contextlib.contextmanager
def refusing_origin() -> Iterator[str]:
    """An address where nothing listens, and nothing else can begin to meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_whole_file_arrives_with_its_hash(server: FileServer):
    assert get(server.add("/a", on.whole(CONTENT))) == CONTENT
    assert get(server.add("/b", on.whole(CONTENT, length=False))) == CONTENT
    assert get(server.add("/c", on.chunked(CONTENT))) == CONTENT
    assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (401, errors.AccessDenied),
        (403, errors.AccessDenied),
        (404, errors.NotFound),
        (410, errors.NotFound),
        (418, errors.FetchFailed),
    ],
)
def test_a_final_status_is_asked_for_once(server: FileServer, code: int, error: type[Exception]):
    with pytest.raises(error):
        get(server.add("/a", on.status(code)))
    assert len(server.requests) == 1


def test_errors_that_pass_are_retried(server: FileServer):
    url = server.add("/a", on.status(500), on.status(503), on.whole(CONTENT))
    assert get(url) == CONTENT
    assert len(server.requests) == 3


def test_retry_after_is_obeyed(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(Budget, "wait", lambda _, seconds: waits.append(seconds))
    in_an_hour = email.utils.formatdate(time.time() + 3600, usegmt=True)
    url = server.add("/a", on.status(429, retry_after=3), on.status(429, retry_after=in_an_hour), on.whole(CONTENT))
    assert get(url, seconds=36_000) == CONTENT
    assert waits[0] == 3
    assert 3000 < waits[1] <= 3600


def test_a_retry_after_beyond_the_deadline_fails_at_once(server: FileServer):
    with pytest.raises(errors.FetchFailed, match="429"):
        get(server.add("/a", on.status(429, retry_after=3600)))
    assert len(server.requests) == 1


def test_a_server_that_always_fails_is_given_up(server: FileServer):
    with pytest.raises(errors.FetchFailed):
        get(server.add("/a", on.status(500)))
    assert len(server.requests) == fetch.ATTEMPTS


def test_a_refused_connection_is_given_up(server: FileServer):
    with refusing_origin() as origin, pytest.raises(errors.FetchFailed, match="could not be reached"):
        get(f"{origin}/a")


def test_redirects_are_followed_and_bounded(server: FileServer):
    server.add("/file", on.whole(CONTENT))
    assert get(server.add("/a", on.redirect("/file", 301))) == CONTENT
    with pytest.raises(errors.FetchFailed, match="more than"):
        get(server.add("/loop", on.redirect("/loop")))
    assert len(server.asked("/loop")) == connect.MAX_REDIRECTS + 1
    with pytest.raises(errors.FetchFailed, match="without saying"):
        get(server.add("/nowhere", on.redirect("")))


def test_the_body_of_a_redirect_is_not_read(server: FileServer):
    def redirect_that_never_ends(handler: on.Handler) -> None:
        handler.start(302, location="/file", content_length=1 << 40)
        while not handler.server.stopping.wait(0.05):
            handler.wfile.write(b"a")

    server.add("/file", on.whole(CONTENT))
    assert get(server.add("/a", redirect_that_never_ends)) == CONTENT


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://user:pass@127.0.0.1/x", "//["])
def test_a_redirect_to_no_plain_url_is_blocked(server: FileServer, location: str):
    with pytest.raises((errors.BlockedAddress, errors.FetchFailed)):
        get(server.add("/a", on.redirect(location)))


def test_authorization_stays_with_its_origin(server: FileServer):
    with FileServer() as other:
        target = other.add("/file", on.whole(CONTENT))
        server.add("/second", on.redirect(target))
        assert get(server.add("/first", on.redirect("/second")), Authorization="Bearer secret") == CONTENT
        assert [request.headers.get("authorization") for request in server.requests] == ["Bearer secret"] * 2
        assert "authorization" not in other.requests[0].headers


@pytest.mark.parametrize("reply", [on.drip(CONTENT), on.silent, on.drip_headers()], ids=["drip", "silent", "headers"])
def test_a_slow_server_meets_the_deadline(server: FileServer, reply: on.Reply):
    with pytest.raises(errors.FetchTimeout):
        get(server.add("/a", reply), seconds=0.5)
    assert len(server.requests) <= 1


@pytest.mark.parametrize("reply", [on.drip(CONTENT), on.silent, on.drip_headers()], ids=["drip", "silent", "headers"])
def test_a_stopped_job_does_not_wait_for_the_server(server: FileServer, reply: on.Reply):
    stop = threading.Event()

    def stop_then_reply(handler: on.Handler) -> None:
        stop.set()
        reply(handler)

    url = server.add("/a", stop_then_reply)
    with pytest.raises(errors.Cancelled):
        fetch_bytes(Target(url), max_bytes=1 << 24, budget=Budget.start(600, stop.is_set))


def test_a_stopped_job_hangs_up(server: FileServer):
    stop, gone = threading.Event(), threading.Event()

    def headers_without_end(handler: on.Handler) -> None:
        stop.set()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        try:
            while not handler.server.stopping.wait(0.05):
                handler.wfile.write(b"a")
        except OSError:
            gone.set()

    target = Target(server.add("/a", headers_without_end))
    with pytest.raises(errors.Cancelled):
        fetch_bytes(target, max_bytes=1 << 24, budget=Budget.start(600, stop.is_set))
    assert gone.wait(25)  # less than the 30 s after which no byte would end the wait


def test_a_read_timeout_is_a_timeout(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connect, "READ_TIMEOUT_S", 0.05)
    waits: list[float] = []
    monkeypatch.setattr(Budget, "wait", lambda _, seconds: waits.append(seconds))
    with pytest.raises(errors.FetchTimeout):
        get(server.add("/a", on.silent))
    assert len(waits) == 4  # between five tries


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_body_is_fetched_again_then_given_up(server: FileServer, reset: bool):
    half = on.cut(CONTENT, len(CONTENT) // 2, reset=reset)
    assert get(server.add("/a", half, on.whole(CONTENT))) == CONTENT
    with pytest.raises((errors.FetchIncomplete, errors.FetchFailed)) as caught:
        get(server.add("/b", half))
    assert caught.type is errors.FetchIncomplete or reset  # a reset may come before the headers were read
    assert len(server.asked("/b")) == fetch.ATTEMPTS


def test_a_cut_chunked_body_is_incomplete(server: FileServer):
    assert get(server.add("/a", on.chunked(CONTENT, complete=False), on.chunked(CONTENT))) == CONTENT
    with pytest.raises(errors.FetchIncomplete):
        get(server.add("/b", on.chunked(CONTENT, complete=False)))


@pytest.mark.parametrize(("header", "value"), [("etag", '"v1"'), ("modified", "Mon, 01 Jan 2024 00:00:00 GMT")])
def test_a_retry_resumes_where_the_body_was_cut(server: FileServer, header: str, value: str):
    def half(handler: on.Handler) -> None:
        name = {"etag": "etag", "modified": "last_modified"}[header]
        handler.start(200, content_length=len(CONTENT), **{name: value})
        handler.wfile.write(CONTENT[: len(CONTENT) // 2])

    assert get(server.add("/a", half, on.whole(CONTENT, **{header: value}))) == CONTENT  # type: ignore[arg-type]
    again = server.requests[1].headers
    assert again["if-range"] == value
    start = int(again["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= len(CONTENT) // 2


def test_a_file_that_changed_is_fetched_from_the_start(server: FileServer):
    changed = CONTENT[::-1]
    url = server.add("/a", on.cut(CONTENT, 5000, etag='"v1"'), on.whole(changed, etag='"v2"'))
    assert get(url) == changed
    # A server that ignores If-Range answers 206 with the new file's tail; that must not be glued on.
    ignores = on.cut(changed, len(changed), etag='"v2"')
    url = server.add("/b", on.cut(CONTENT, 5000, etag='"v1"'), ignores, on.whole(changed, etag='"v2"'))
    assert get(url) == changed


def test_no_resume_without_a_validator_or_with_a_weak_one(server: FileServer):
    for path, etag in (("/a", ""), ("/b", 'W/"v1"')):
        url = server.add(path, on.cut(CONTENT, 5000, etag=etag), on.whole(CONTENT, etag=etag))
        assert get(url) == CONTENT
        assert "range" not in server.asked(path)[1].headers


NINES = "9" * 5000


SENSELESS = {
    "length": (on.status(200, b"1", content_length=NINES), errors.TooLarge),
    "seconds": (on.status(429, retry_after=NINES), errors.FetchFailed),
    "date": (on.status(429, retry_after="Fri, 31 Dec 2030 23:59:59 +9999999999999999999999"), errors.FetchFailed),
    "range": (on.status(206, b"1", content_range=f"bytes {NINES}-{NINES}/{NINES}"), errors.FetchFailed),
    "path": (on.redirect("/" + "a" * 60_000), errors.NotFound),
    "address": (on.redirect("http://[" + "a" * 60_000), errors.FetchFailed),
    "port": (on.redirect("http://host:" + NINES), errors.BlockedAddress),
    "host": (on.redirect("http://%ff/"), errors.BlockedAddress),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_headers_beyond_any_sense_are_the_host_s_fault(server: FileServer, name: str):
    reply, error = SENSELESS[name]
    with pytest.raises(error):
        get(server.add("/a", reply))


def test_a_content_range_beyond_any_sense_does_not_continue_a_file(server: FileServer):
    def senseless(handler: on.Handler) -> None:
        handler.start(206, content_range=f"bytes {NINES}-{NINES}/{NINES}", content_length=1, etag='"v1"')
        handler.wfile.write(b"1")

    url = server.add("/a", on.cut(CONTENT, 5000, etag='"v1"'), senseless, on.whole(CONTENT, etag='"v1"'))
    assert get(url) == CONTENT


def test_progress_does_not_count_as_failure(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "GOOD_PROGRESS", 1000)
    url = server.add("/a", *[on.cut(CONTENT, 100_000, etag='"v"')] * 11)
    assert get(url) == CONTENT


def test_the_size_cap_holds_with_and_without_a_length(server: FileServer):
    for reply in (on.whole(CONTENT), on.whole(CONTENT, length=False), on.chunked(CONTENT), on.endless):
        with pytest.raises(errors.TooLarge):
            get(server.add("/a", reply), max_bytes=100_000)
    assert len(server.requests) == 4


def test_a_gzip_bomb_is_refused_unread(server: FileServer):
    url = server.add("/a", on.gzip_bomb(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(errors.TooLarge):
            get(url)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_progress_is_told_with_the_total_and_not_too_often(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    def told(url: str) -> list[tuple[int, int | None]]:
        states: list[tuple[int, int | None]] = []
        budget = Budget.start(20)
        fetch_to(
            io.BytesIO(), Target(url), max_bytes=1 << 24, budget=budget, on_progress=lambda *state: states.append(state)
        )
        return states

    known, unknown = server.add("/a", on.whole(CONTENT)), server.add("/b", on.whole(CONTENT, length=False))
    monkeypatch.setattr(fetch, "PROGRESS_INTERVAL_S", float("inf"))
    assert told(known) == [(len(CONTENT), len(CONTENT))]
    assert told(unknown) == [(len(CONTENT), None)]
    monkeypatch.setattr(fetch, "PROGRESS_INTERVAL_S", 0.0)
    every = told(known)
    assert len(every) > 1
    assert every == sorted(every)
    assert every[-1] == (len(CONTENT), len(CONTENT))


BLOCKED = [
    "http://169.254.169.254/latest/meta-data/",
    "http://127.1:{port}/x",
    "http://127.0.0.1:{port}/x",
    "http://localhost:{port}/x",
    "http://0x7f000001:{port}/x",
    "http://[::1]:{port}/x",
    "http://[::ffff:127.0.0.1]:{port}/x",
    "http://[::ffff:10.0.0.1]/x",
    "http://[2002:7f00:1::]/x",
    "http://[64:ff9b::7f00:1]/x",
    "http://[64:ff9b:1::7f00:1]/x",
    "http://[fec0::1]/x",
    "http://192.0.0.192/opc/v2/",
    "http://192.88.99.1/x",
    "http://100.64.0.1/x",
    "http://0.0.0.0:{port}/x",
    "http://168.63.129.16/metadata",
    "http://[::ffff:168.63.129.16]/metadata",
    "http://[::127.0.0.1]:{port}/x",
]


@pytest.mark.parametrize("url", BLOCKED)
def test_addresses_that_are_not_public_are_never_connected_to(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, url: str
):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    connected: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda _, address: connected.append(address))
    with pytest.raises(errors.BlockedAddress):
        get(url.format(port=server.server_port))
    assert (server.connections, connected) == (0, [])


@pytest.mark.parametrize("url", BLOCKED)
def test_a_redirect_to_them_is_not_followed(server: FileServer, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    with FileServer() as inside:
        start = server.add("/a", on.redirect(url.format(port=inside.server_port)))
        # The first host is trusted here, as HF_ENDPOINT is: its redirects are not.
        target = Target(start, trusted_origin=server.origin)
        if url.startswith("http://127.0.0.1:"):
            assert target.trusted_origin != url.format(port=inside.server_port)
        with pytest.raises(errors.BlockedAddress):
            fetch_to(io.BytesIO(), target, max_bytes=100, budget=Budget.start(20))
        assert inside.connections == 0


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch):
    def resolve(*_arguments: object, **_options: object) -> list[tuple]:
        return [(2, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    with pytest.raises(errors.BlockedAddress):
        fetch_bytes(Target("http://rebind.test/x"), max_bytes=100, budget=Budget.start(20))


def test_the_extra_blocks_hold_for_host_names_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_a, **_o: [(2, 1, 6, "", ("192.0.0.192", 80))])
    with pytest.raises(errors.BlockedAddress):
        fetch_bytes(Target("http://metadata.test/x"), max_bytes=100, budget=Budget.start(20))


def test_a_host_that_does_not_resolve_in_time_meets_the_deadline(monkeypatch: pytest.MonkeyPatch):
    asked = threading.Event()
    release = threading.Event()

    def resolve(*_arguments: object, **_options: object) -> list[tuple]:
        asked.set()
        release.wait(20)
        return []

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    with pytest.raises(errors.FetchTimeout):
        fetch_bytes(Target("http://slow-dns.test/x"), max_bytes=100, budget=Budget.start(0.3))
    assert asked.wait(60)
    release.set()


def test_secrets_are_in_no_message_and_no_log(server: FileServer, all_logs: pytest.LogCaptureFixture):
    secret = "-".join(("s3", "cr3t"))  # in one piece it would be in every traceback, as source code
    query = f"?token={secret}&sig={secret}"
    replies = [on.status(500), on.status(404), on.redirect(f"/a{query}"), on.cut(CONTENT, 10), on.silent]
    urls = [server.add(f"/{index}", reply) for index, reply in enumerate(replies)]
    with refusing_origin() as origin:
        urls.append(f"{origin}/a")
        for url in urls:
            with pytest.raises(errors.FetchError) as caught:
                get(url + query, seconds=1.0 if url.endswith("/4") else 60.0, Authorization=f"Bearer {secret}")
            logging.getLogger("test").error("failed", exc_info=caught.value)
    assert all_logs.text.count("Traceback") >= len(urls)
    assert secret not in all_logs.text
    assert server.requests[0].query == query[1:]


def test_fetch_bytes_gives_the_body(server: FileServer):
    target = Target(server.add("/a", on.whole(CONTENT)))
    assert fetch_bytes(target, max_bytes=1 << 24, budget=Budget.start(20)) == CONTENT
