"""What a piece of code costs, measured in a process of its own: after an earlier peak no later one would be seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# VmHWM begins anew with the program; ru_maxrss would begin with what this process has.
_PROGRAM = """
import json, time
from pathlib import Path

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

{setup}
before, start = peak(), time.process_time()
{code}
print(json.dumps([peak() - before, time.process_time() - start]))
"""


def cost_of(code: str, setup: str, *, timeout_s: float = 300.0) -> tuple[int, float]:
    """(bytes by which the peak of memory grows, seconds of processor time) of `code`, which runs after `setup`."""
    program = _PROGRAM.format(setup=setup, code=code)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=_ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, seconds = json.loads(done.stdout.splitlines()[-1])
    return grown, seconds
