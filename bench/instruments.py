"""A clock and a memory gauge that know about the GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Times what it is asked to, in seconds, with the device idle before and after."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize()

    def time(self, action: Callable[[], Any]) -> float:
        """Seconds that `action` takes."""
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start


class Memory:
    """Peak memory in bytes since `reset`: of the GPU, or of this process."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def reset(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The peak since `reset`."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
