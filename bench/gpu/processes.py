"""Ending a process and all that it has started."""

from __future__ import annotations

import contextlib
import time

import psutil

# A killed process goes when the kernel gets to it: one that holds a GPU takes a while.
PATIENCE_S = 20.0


def end_with_all_started(process: int) -> None:
    """Kill it, and what has come of it: real workers are in sessions of their own, and would keep the GPU busy.

    Returns when all of them have ended, the process itself unasked how it did.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        everyone = [*parent.children(recursive=True), parent]
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        # Not psutil.wait_procs, which waits for those that nobody has asked how they ended.
        deadline = time.monotonic() + PATIENCE_S
        while any(_is_alive(each) for each in everyone) and time.monotonic() < deadline:
            time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
