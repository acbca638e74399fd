"""handler.py without the pauses that the SDK makes: a second before it looks for a free place again, more before it
sends an answer again. What it does, and in which order, stays."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import aiohttp_retry
from runpod.serverless.modules import rp_scale

import handler

SCRIPT = "import sys; from tests.integration.hasty_worker import main; sys.exit(main())"
PAUSE_S = 0.02


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(min(seconds, PAUSE_S))


def hurry() -> None:
    """For this process, before its worker starts."""
    rp_scale.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": _sleep})
    aiohttp_retry.FibonacciRetry.get_timeout = lambda *_, **__: 0.0  # type: ignore[method-assign]


def main() -> int:
    """Run until RunPod says SIGTERM; the exit status."""
    hurry()
    return handler.main()


if __name__ == "__main__":
    sys.exit(main())
