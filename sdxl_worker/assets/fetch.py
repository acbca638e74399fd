"""Fetch a URL whole, within one deadline: retries, resuming, size cap and progress."""

import io
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import requests
import urllib3

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import SocketWatch, Target, open_url
from sdxl_worker.assets.hashing import BackgroundSha256
from sdxl_worker.assets.http_headers import content_length, content_range, retry_after, validator
from sdxl_worker.errors import (
    AccessDenied,
    CacheWriteError,
    FetchError,
    FetchFailed,
    FetchIncomplete,
    FetchTimeout,
    NotFound,
    TooLarge,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

ATTEMPTS = 5  # in a row without at least GOOD_PROGRESS more bytes
GOOD_PROGRESS = 8 << 20
BACKOFF_S = 0.5
CHUNK = 4 << 20
PROGRESS_INTERVAL_S = 0.25
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# ValueError: headers and addresses that the HTTP libraries cannot read.
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "sdxl-lora-worker", "Accept": "*/*"}


@dataclass
class _Transfer:
    """The state of one download over all its attempts."""

    sink: BinaryIO
    max_bytes: int
    on_progress: Progress | None
    digest: BackgroundSha256
    done: int = 0
    total: int | None = None
    validator: str = ""
    reported_at: float = 0.0

    def restart(self) -> None:
        self.done, self.total, self.validator = 0, None, ""
        self.digest.restart()
        _write_to_disk(lambda: (self.sink.seek(0), self.sink.truncate()))

    def add(self, chunk: bytes) -> None:
        if self.done + len(chunk) > self.max_bytes:
            raise _too_large(self.max_bytes)
        self.digest.update(chunk)
        _write_to_disk(lambda: _write_all(self.sink, chunk))
        self.done += len(chunk)
        self.report()

    def report(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if self.on_progress is not None and (last or now - self.reported_at >= PROGRESS_INTERVAL_S):
            self.reported_at = now
            self.on_progress(self.done, self.total)


@dataclass(frozen=True)
class Fetched:
    """What arrived: number of bytes and their sha256 (hex)."""

    size: int
    sha256: str


class _Retry(Exception):
    """This attempt failed in a way that another may not; `error` is what to raise when none is left."""

    def __init__(self, error: FetchError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


def fetch_to(
    sink: BinaryIO, target: Target, *, max_bytes: int, budget: Budget, on_progress: Progress | None = None
) -> Fetched:
    """Write the whole body of `target` into `sink` (an empty, seekable, unbuffered binary file).

    Raises the FetchError that the fault list names for what went wrong, Cancelled when the job was stopped, and
    CacheWriteError when `sink` cannot take the bytes.
    """
    with BackgroundSha256() as digest:
        transfer = _Transfer(sink, max_bytes, on_progress, digest)
        failures = 0
        while True:
            before = transfer.done
            try:
                _attempt(target, transfer, budget)
            except _Retry as retry:
                failures = 1 if transfer.done - before >= GOOD_PROGRESS else failures + 1
                _prepare_retry(retry, failures, target, budget)
            else:
                transfer.report(last=True)
                return Fetched(transfer.done, digest.hexdigest())


def fetch_bytes(target: Target, *, max_bytes: int, budget: Budget) -> bytes:
    """The whole body of `target`; raises as `fetch_to` does."""
    sink = io.BytesIO()
    fetch_to(sink, target, max_bytes=max_bytes, budget=budget)
    return sink.getvalue()


def _prepare_retry(retry: _Retry, failures: int, target: Target, budget: Budget) -> None:
    wait_s = retry.wait_s
    if wait_s is None:
        wait_s = BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
    if failures >= ATTEMPTS or (retry.wait_s is not None and wait_s >= budget.remaining):
        raise retry.error from None
    logger.info("%s; trying again in %.1f s", retry, wait_s)
    budget.wait(wait_s)


def _attempt(target: Target, transfer: _Transfer, budget: Budget) -> None:
    """One request: the body, or what is missing of it; raises _Retry when it is worth another."""
    headers = dict(_HEADERS)
    if transfer.done and transfer.validator:
        headers |= {"Range": f"bytes={transfer.done}-", "If-Range": transfer.validator}
    elif transfer.done:
        transfer.restart()
    with SocketWatch(budget) as watch:
        try:
            response = open_url(target, headers, budget, watch)
        except _NETWORK_ERRORS as error:
            # Not chained: the text of these exceptions holds the query string, and a logged traceback would show it.
            raise budget.verdict() or _Retry(_connection_error(target, error)) from None
        try:
            _check_status(response, target, transfer)
            _begin_body(response, target, transfer)
            _read_body(response, target, transfer, budget)
        finally:
            response.close()


def _connection_error(target: Target, error: Exception) -> FetchError:
    if isinstance(error, requests.Timeout):
        return FetchTimeout(f"{target.shown} did not answer in time")
    return FetchFailed(f"{target.shown} could not be reached ({type(error).__name__})")


def _body_error(target: Target, transfer: _Transfer, error: Exception) -> FetchError:
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return FetchTimeout(f"{target.shown} stopped sending after {transfer.done} bytes")
    return FetchIncomplete(f"{target.shown} ended early, after {transfer.done} bytes")


def _check_status(response: requests.Response, target: Target, transfer: _Transfer) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status == 416 and transfer.done:
        transfer.restart()
        raise _Retry(FetchFailed(f"{target.shown} does not resume"))
    if status in _RETRIED:
        raise _Retry(FetchFailed(f"{target.shown} answers with status {status}"), retry_after(response.headers))
    if status in (401, 403):
        hint = target.auth_hint or "use a link that needs no login"
        raise AccessDenied(f"{target.shown} refuses access (status {status}); {hint}")
    if status in (404, 410):
        raise NotFound(f"{target.shown} does not exist (status {status})")
    raise FetchFailed(f"{target.shown} answers with status {status}")


def _begin_body(response: requests.Response, target: Target, transfer: _Transfer) -> None:
    """Check the headers of a body, and decide whether it continues what is there or starts anew."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        # Asked for none. What it would inflate to cannot be known, so it counts as too large.
        raise TooLarge(f"{target.shown} comes compressed, which has no bounded size")
    if response.status_code == 206 and transfer.done:
        start, total = content_range(headers.get("Content-Range", ""))
        if start == transfer.done and total == transfer.total and validator(headers) == transfer.validator:
            return
        transfer.restart()
        raise _Retry(FetchIncomplete(f"{target.shown} changed during the download"))
    if response.status_code == 206:
        raise FetchFailed(f"{target.shown} sends only a part of the file")
    if transfer.done:
        transfer.restart()
    transfer.total = content_length(headers)
    transfer.validator = validator(headers)
    if transfer.total is not None and transfer.total > transfer.max_bytes:
        raise _too_large(transfer.max_bytes)


def _read_body(response: requests.Response, target: Target, transfer: _Transfer, budget: Budget) -> None:
    raw = response.raw
    while True:
        budget.check()
        try:
            # read1: whatever has arrived, so that progress and stopping do not wait for a whole chunk.
            chunk = raw.read1(CHUNK, decode_content=False)
        except _NETWORK_ERRORS as error:
            raise budget.verdict() or _Retry(_body_error(target, transfer, error)) from None
        if not chunk:
            break
        transfer.add(chunk)
    budget.check()
    if transfer.total is not None and transfer.done != transfer.total:
        raise _Retry(FetchIncomplete(f"{target.shown} ended early, after {transfer.done} bytes"))


def _write_all(sink: BinaryIO, chunk: bytes) -> None:
    """An unbuffered file may take only a part at once, on a disk that is nearly full for example."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[sink.write(rest) :]


def _write_to_disk(write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise CacheWriteError(f"the file cannot be written ({error.strerror or 'I/O error'})") from error


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the file is larger than the {max_bytes / 1e6:g} MB that are allowed")
