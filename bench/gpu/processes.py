"""Ending a process and all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def end_with_all_started(process: int) -> None:
    """Kill it, and what has come of it: real workers are in sessions of their own, and would keep the GPU busy."""
    for each in (*_started_by(process), process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _started_by(process: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
