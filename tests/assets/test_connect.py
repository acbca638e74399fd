"""TLS through pinned connections, and hosts with several addresses."""

from __future__ import annotations

import contextlib
import datetime
import io
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3.util.connection
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sdxl_worker import errors
from sdxl_worker.assets import connect, fetch
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import fetch_to
from tests.support import http_server as on
from tests.support.http_server import FileServer

CONTENT = bytes(range(256)) * 100


def self_signed(path: Path, name: str) -> Path:
    """A certificate for the host `name` and its key, as one PEM file at `path`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def with_tls(server: FileServer, pem: Path) -> str:
    """Let `server` speak TLS; gives its port as text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return str(server.server_port)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A TLS server for the name localhost, whose certificate is trusted."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    pem = self_signed(tmp_path / "localhost.pem", "localhost")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    running = FileServer()
    with_tls(running, pem)
    with running:
        yield running


def get(url: str, *, seconds: float = 20.0, stop: threading.Event | None = None) -> bytes:
    sink = io.BytesIO()
    budget = Budget.start(seconds, stop.is_set if stop else None)
    fetch_to(sink, Target(url), max_bytes=1 << 24, budget=budget)
    return sink.getvalue()


def test_the_certificate_is_checked_against_the_name_and_not_the_address(server: FileServer):
    server.add("/a", on.whole(CONTENT))
    assert get(f"https://localhost:{server.server_port}/a") == CONTENT
    assert server.requests[0].headers["host"] == f"localhost:{server.server_port}"
    with pytest.raises(errors.FetchFailed):
        get(f"https://127.0.0.1:{server.server_port}/a")


def test_a_certificate_nobody_vouches_for_is_refused(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    server.add("/a", on.whole(CONTENT))
    with pytest.raises(errors.FetchFailed):
        get(f"https://localhost:{server.server_port}/a")
    assert server.requests == []


@pytest.mark.parametrize("reply", [on.drip(CONTENT), on.silent, on.drip_headers()], ids=["drip", "silent", "headers"])
def test_deadline_and_stop_reach_through_tls(server: FileServer, reply: on.Reply):
    stop = threading.Event()

    def stop_then_reply(handler: on.Handler) -> None:
        stop.set()
        reply(handler)

    server.add("/slow", reply)
    server.add("/stopped", stop_then_reply)
    with pytest.raises(errors.FetchTimeout):
        get(f"https://localhost:{server.server_port}/slow", seconds=0.5)
    with pytest.raises(errors.Cancelled):
        get(f"https://localhost:{server.server_port}/stopped", seconds=600, stop=stop)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_stopped_job_waits_for_no_connection_and_no_handshake(scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT_S", 600.0)
    stop = threading.Event()
    create = urllib3.util.connection.create_connection

    def stop_then_create(*arguments: Any, **options: Any) -> socket.socket:
        stop.set()
        return create(*arguments, **options)

    monkeypatch.setattr(urllib3.util.connection, "create_connection", stop_then_create)
    with contextlib.ExitStack() as open_sockets:
        deaf = open_sockets.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(2 if scheme == "http" else 0):  # its queue is full: the next connection waits
            waiting = open_sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        with pytest.raises(errors.Cancelled):
            get(f"{scheme}://127.0.0.1:{deaf.getsockname()[1]}/a", seconds=600, stop=stop)


def test_the_next_address_is_tried_when_one_does_not_answer(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    known = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        names = ("127.0.0.2", "127.0.0.1") if host == "two.test" else (host,)
        return [entry for name in names for entry in known(name, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with FileServer() as plain, socket.socket() as deaf:
        deaf.bind(("127.0.0.2", plain.server_port))  # nothing listens there, and nothing else can begin to
        plain.add("/a", on.whole(CONTENT))
        assert get(f"http://two.test:{plain.server_port}/a") == CONTENT
        assert plain.requests[0].headers["host"] == f"two.test:{plain.server_port}"


def test_proxies_of_the_environment_are_not_used(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    with FileServer() as proxy:
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.origin)
        monkeypatch.delenv("no_proxy", raising=False)
        server.add("/a", on.whole(CONTENT))
        assert get(f"https://localhost:{server.server_port}/a") == CONTENT
        assert proxy.connections == 0
