"""The import of RunPod's SDK without the second that it spends on the processor's name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_KERNEL_SAYS = Path("/proc/cpuinfo")


def import_sdk() -> None:
    """Import runpod; to be called before anything else does.

    Its rp_debugger asks py-cpuinfo for the processor's name while it is imported, which only --rp_debugger shows.
    py-cpuinfo runs more processes for all that a processor can say (1.1 s of 1.4 s); the name here comes from the place
    where it looks first.
    """
    if "runpod" in sys.modules:
        return
    with _name_from_the_kernel():
        import runpod.serverless  # noqa: F401


@contextlib.contextmanager
def _name_from_the_kernel() -> Iterator[None]:
    try:
        import cpuinfo
    except ImportError:  # an SDK that no longer brings it
        yield
        return
    ask = cpuinfo.get_cpu_info
    name = _processor()
    cpuinfo.get_cpu_info = lambda: _Facts(ask, {"brand_raw": name} if name else {})
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = ask


class _Facts(dict[str, Any]):
    """What is known; for anything else py-cpuinfo is asked."""

    def __init__(self, ask: Callable[[], dict[str, Any]], known: dict[str, Any]) -> None:
        super().__init__(known)
        self._ask = ask

    def __missing__(self, key: str) -> Any:
        return self._ask()[key]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in _KERNEL_SAYS.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return ""
