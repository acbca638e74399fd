"""What a case costs: memory of this process, and time that a busy machine does not add to."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(work: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
    """What `work` gives, and how long this thread slept meanwhile."""
    start, busy = time.monotonic(), _busy_s()
    return work(argument), time.monotonic() - start - (_busy_s() - busy)


def _busy_s() -> float:
    """Seconds that this thread ran or waited for a processor (Linux; elsewhere only those that it ran)."""
    with contextlib.suppress(OSError):
        ran, waited, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
        return (int(ran) + int(waited)) / 1e9
    return time.thread_time()


def resident_mb() -> float:
    """Resident memory of this process."""
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The most resident memory since `reset_peak`."""
    return _status_mb("VmHWM")


def reset_peak() -> None:
    """Let the peak begin anew (Linux; elsewhere it stays that of the process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def settle_memory() -> None:
    """Give back what is free, so that resident memory means memory in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_mb(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0
