"""Open a hostile URL: the SDK's address guard at every hop, secrets to one origin only, no read without an end.

The SDK's safe_get() follows redirects itself: it sends Authorization along to another origin, validates an address and
connects without letting the caller look at it, and has no total deadline. So its two public building blocks are used
hop by hop instead: resolve_and_validate() decides which addresses are public, PinnedIPAdapter connects to exactly
those. Environment proxies are never used, since a proxy would resolve the name again.
"""

import functools
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter

from sdxl_worker.assets.budget import TICK_S, Budget, run_within
from sdxl_worker.assets.urls import split_http_url
from sdxl_worker.errors import AccessDenied, BlockedAddress, FetchFailed
from sdxl_worker.masking import mask

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Not caught by the SDK's check on Python 3.11: Azure's platform address, the protocol-assignments block (with Oracle
# Cloud's metadata address 192.0.0.192), 6to4 relays, 6to4, NAT64 and site-local addresses and IPv6 addresses that hold
# an IPv4 one, which all can lead to a private host.
_NEVER_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        *("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24"),
        *("2002::/16", "fec0::/10", "64:ff9b::/96", "64:ff9b:1::/48", "::/96"),
    )
)


@dataclass(frozen=True)
class Target:
    """What to GET. `private_headers` go to the URL's own origin only; `trusted_origin` is the operator's own choice
    (HF_ENDPOINT) and may be a private address; `login_path` marks a redirect that asks for a login, which `auth_hint`
    answers."""

    url: str
    private_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    trusted_origin: str = ""
    login_path: str = ""
    auth_hint: str = ""

    @property
    def shown(self) -> str:
        return mask(self.url)


class SocketWatch:
    """Shuts the current socket down when the budget ends: a server that drips bytes outlives every read timeout.

    A context manager around one request and the reading of its body.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._sockets: list[socket.socket] = []
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="socket-watch", daemon=True)

    def add(self, connected: socket.socket) -> None:
        """Watch this socket too; one that comes when all is over is shut down at once."""
        with self._lock:
            self._sockets.append(connected)
            if self._finished.is_set():
                self._shut_down()

    def _run(self) -> None:
        while not self._finished.wait(TICK_S):
            if self._budget.is_over:
                with self._lock:
                    self._shut_down()

    def _shut_down(self) -> None:
        for connected in self._sockets:
            try:
                # The plain socket's method also below TLS: SSLSocket.shutdown would race with the reader.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError:
                logger.debug("the socket was closed already")

    def __enter__(self) -> "SocketWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        with self._lock:
            # A thread that `run_within` left behind may still be reading.
            self._shut_down()


class _OneHop(requests.Session):
    """A session that leaves a redirect alone: requests would read its whole body, into memory, even unfollowed."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def open_url(target: Target, headers: Mapping[str, str], budget: Budget, watch: SocketWatch) -> requests.Response:
    """The streamed answer (any status but a redirect) to GET `target.url`; the caller closes it.

    Raises BlockedAddress before any connection to a non-public address, AccessDenied for a redirect to a login page,
    FetchFailed for broken redirects, FetchTimeout, Cancelled, and requests' own exceptions for a retry.
    """
    own_origin = _origin(target.url)
    current = target.url
    for _ in range(MAX_REDIRECTS + 1):
        budget.check()
        sent = {**headers, **(target.private_headers if _origin(current) == own_origin else {})}
        response = _get(current, sent, _addresses(current, target, budget), budget, watch)
        if response.status_code not in _REDIRECTS:
            return response
        location = response.headers.get("Location", "")
        response.close()
        current = _next_hop(current, location, target)
    raise FetchFailed(f"{target.shown} redirects more than {MAX_REDIRECTS} times")


def _next_hop(current: str, location: str, target: Target) -> str:
    if not location:
        raise FetchFailed(f"{mask(current)} redirects without saying where to")
    following = urljoin(current, location)
    split_http_url(following, BlockedAddress)
    if target.login_path and urlsplit(following).path.startswith(target.login_path):
        raise AccessDenied(f"{target.shown} asks for a login; {target.auth_hint}")
    return following


def _origin(url: str) -> str:
    scheme, host, port = split_http_url(url, BlockedAddress)
    return f"{scheme}://{host}:{port}"


def _addresses(url: str, target: Target, budget: Budget) -> list[str]:
    """The addresses that may be connected to, all of them public unless the operator named this origin."""
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate  # the SDK takes a second to import

    _, host, port = split_http_url(url, BlockedAddress)
    trusted = bool(target.trusted_origin) and _origin(url) == _origin(target.trusted_origin)
    resolve: Callable[[str, int], list[str]] = _resolve if trusted else resolve_and_validate
    try:
        found = run_within(budget, functools.partial(resolve, host, port))
    except SSRFError as error:
        if "could not resolve" in str(error):
            raise FetchFailed(f"the host of {mask(url)} is not known") from None
        raise BlockedAddress(f"{mask(url)} does not lead to a public address") from None
    except (OSError, UnicodeError):
        raise FetchFailed(f"the host of {mask(url)} is not known") from None
    if not trusted and any(_is_never_public(address) for address in found):
        raise BlockedAddress(f"{mask(url)} does not lead to a public address")
    return found


def _resolve(host: str, port: int) -> list[str]:
    return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def _is_never_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in block for block in _NEVER_PUBLIC)


def _get(
    url: str, headers: Mapping[str, str], addresses: list[str], budget: Budget, watch: SocketWatch
) -> requests.Response:
    """GET from the first address that accepts a connection, as any HTTP client does for a host with several."""
    last_error: Exception = FetchFailed(f"{mask(url)} has no address")
    for address in addresses:
        budget.check()
        session = _OneHop()
        session.trust_env = False  # no proxies (see above), no .netrc passwords
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        adapter = _adapter(address, watch)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        remaining = max(0.1, budget.remaining)
        timeouts = (min(CONNECT_TIMEOUT_S, remaining), min(READ_TIMEOUT_S, remaining))
        try:
            get = functools.partial(session.get, headers=dict(headers), allow_redirects=False, stream=True)
            # A thread: nothing else ends the wait for a connection, or for a handshake, with the job.
            response = run_within(budget, functools.partial(get, url, timeout=timeouts))
        except requests.ConnectionError as error:
            session.close()
            last_error = error
            continue
        except BaseException:
            session.close()
            raise
        _close_together(response, session)
        return response
    raise last_error


def _close_together(response: requests.Response, session: requests.Session) -> None:
    """Closing the answer closes its one-request session too, whose sockets would leak otherwise."""
    close_response = response.close

    def close() -> None:
        close_response()
        session.close()

    response.close = close  # type: ignore[method-assign]


def _adapter(address: str, watch: SocketWatch) -> HTTPAdapter:
    """The SDK's pinned adapter, whose connections report their socket to `watch`."""
    from runpod.serverless.utils.rp_ssrf import PinnedIPAdapter

    class WatchedAdapter(PinnedIPAdapter):
        def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
            pool = super().get_connection_with_tls_context(*arguments, **options)
            connection_class = pool.ConnectionCls

            class WatchedConnection(connection_class):  # type: ignore[misc, valid-type]
                def connect(self) -> None:
                    super().connect()
                    watch.add(self.sock)

            pool.ConnectionCls = WatchedConnection
            return pool

    return WatchedAdapter(address)
