"""Figures that need no GPU and no pipeline, for the command that measures: each leaves a line where it ran."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def good(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Prints as libraries do, and gives a result."""
    _ran(options)
    os.write(1, b"loading 100%\n")
    return {"ratio": 1.5}


def wrong(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Raises."""
    _ran(options)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dead(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Ends its process, as a crash of the driver does."""
    _ran(options)
    os.write(2, b"the driver's last words\n")
    os._exit(3)


def endless(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Never comes back, nor does the worker that it has started."""
    _ran(options)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    _ran(options, worker.pid)
    threading.Event().wait()
    return {}


def _ran(options: argparse.Namespace, process: int = 0) -> None:
    with Path(options.log).open("a") as log:
        log.write(f"{options.name} {process or os.getpid()}\n")
