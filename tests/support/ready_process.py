"""A process that has done what takes seconds, such as importing diffusers, and measures each piece of code in a fork.

A fork begins where a fresh process would be by then: its peak of memory and its processor time begin anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import gc, json, os, sys, time, traceback
from pathlib import Path

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def told(code):
    names = dict(globals())
    try:
        exec(code, names)
        return [names["result"], ""]
    except BaseException:
        return [None, traceback.format_exc()]

{setup}
for line in sys.stdin:
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, json.dumps(told(json.loads(line))).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        sys.stdout.write(answer.read().decode() + "\\n")
    sys.stdout.flush()
    os.wait()
"""


class ReadyProcess:
    """Runs `setup` once, in one thread; a context manager.

    Beside the names of `setup` code finds `peak()` and `resident()`, in bytes, `time`, `gc` and `Path`.
    """

    def __init__(self, setup: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.replace("{setup}", setup)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> ReadyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        # At the end of its input it ends.
        self._process.communicate()

    def result_of(self, code: str) -> Any:
        """What `code` leaves in `result`, which has to be JSON; fails with its traceback."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        result, error = json.loads(line)
        assert not error, error
        return result
