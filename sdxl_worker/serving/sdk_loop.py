"""Two things that the SDK's job loop (runpod 1.12.0) needs so that every job it takes is answered once.

Left alone, the loop waits up to 90 seconds in a job request that is still open when RunPod says SIGTERM, and a job that
arrives in there is taken, never run and never answered (rp_scale.JobScaler). And of the three tries it means to give an
answer, only HTTP errors get more than one: a dropped connection loses the answer (rp_http._transmit, aiohttp_retry).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp_retry import FibonacciRetry
from runpod.serverless.modules import rp_http
from runpod.serverless.modules.rp_scale import JobScaler

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2

Fetcher = Callable[..., Awaitable[Any]]


def retry_dropped_connections() -> None:
    """Give an answer whose connection breaks the same three tries as one that meets an HTTP error."""
    exceptions = (aiohttp.ClientConnectionError, asyncio.TimeoutError)
    rp_http.FibonacciRetry = functools.partial(FibonacciRetry, exceptions=exceptions)


def running_scaler() -> JobScaler | None:
    """The SDK's job loop of this process, which handles SIGTERM while it runs."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, JobScaler) else None


def leave_promptly(scaler: JobScaler) -> None:
    """Make the loop's open requests end with the loop; a job that slips in then is run and answered. Does it once."""
    if getattr(scaler.jobs_fetcher, "__self__", None) is None:
        stop_signals = scaler.stop_signals_fetcher
        scaler.jobs_fetcher = _JobRequest(scaler, scaler.jobs_fetcher).fetch
        scaler.stop_signals_fetcher = _while_alive(scaler, stop_signals)


class _JobRequest:
    """Asks for jobs until the loop ends."""

    def __init__(self, scaler: JobScaler, fetcher: Fetcher) -> None:
        self._scaler = scaler
        self._fetch_while_alive = _while_alive(scaler, fetcher)

    async def fetch(self, session: Any, count: int = 1) -> list[dict[str, Any]] | None:
        jobs = await self._fetch_while_alive(session, count)
        if self._scaler.is_alive() or not jobs:
            return jobs
        for job in jobs:
            logger.info("job %s arrived during shutdown and is run all the same", job.get("id"))
            await self._scaler.jobs_handler(session, self._scaler.config, job)
        return None


def _while_alive(scaler: JobScaler, fetcher: Fetcher) -> Fetcher:
    async def fetch(*arguments: Any) -> Any:
        request = asyncio.ensure_future(fetcher(*arguments))
        try:
            while scaler.is_alive() and not request.done():
                await asyncio.wait({request}, timeout=POLL_SECONDS)
            return request.result() if request.done() else []
        finally:
            request.cancel()

    return fetch
