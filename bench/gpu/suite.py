"""The tests marked gpu, in a process of their own, with what came of each that did not pass."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu.figures import COMPILING_TESTS
from bench.gpu.processes import end_with_all_started
from bench.gpu.store import ROOT

TAIL = 2000
# Seconds for the report, once pytest was interrupted.
REPORT_S = 20.0
# Where this runs in a shell's background, SIGINT is ignored, and Python would leave it so.
_PYTEST = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
_LAST = ("tests/bench/", "tests/generate/")


def files_with_gpu_tests(root: Path = ROOT) -> list[str]:
    """Test modules that have some: only these are collected, since the others' libraries may be missing here."""
    found = (path for path in (root / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    # Weights and safety first: what comes last may be cut off.
    return sorted((str(path.relative_to(root)) for path in found), key=lambda file: (file.startswith(_LAST), file))


def measure(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Counts, seconds and failures of pytest on `options.files` within `options.limit_s`.

    None are all but COMPILING_TESTS.
    """
    files = options.files or [file for file in files_with_gpu_tests() if file not in COMPILING_TESTS]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        command = [sys.executable, "-c", _PYTEST, "-m", "gpu", "-vv", "-p", "no:cacheprovider", "--color=no"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *files]
        started = time.perf_counter()
        status = _status(command, log, options.limit_s)
        seconds = time.perf_counter() - started
        output = log.read_text(encoding="utf-8", errors="replace")
        counts = _reported(report) if report.exists() else _told(output)
        if not report.exists() or status.startswith("stopped"):
            # What it did not come to is one more failure.
            counts["failures"].append({"test": _last_begun(output), "message": "pytest did not come to its end here"})
            counts["failed"] += 1
    return {"status": status, "pytest_s": seconds, "files": files, **counts, "output": output[-TAIL:]}


def _status(command: list[str], log: Path, limit_s: float) -> str:
    """How it ended; at the limit it is interrupted as with Ctrl-C, upon which pytest writes its report."""
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            return str(process.wait(limit_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REPORT_S)
            return f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                end_with_all_started(process.pid)


def _reported(report: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    failures, seconds = [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.get("name") is None:
            # The one that was interrupted.
            continue
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = float(case.get("time", 0))
        broken = [child for child in case if child.tag in ("failure", "error")]
        if broken:
            failures.append({"test": name, "message": (broken[0].get("message") or "")[:TAIL]})
            failures[-1]["end"] = (broken[0].text or "")[-TAIL:]
        counts["failed" if broken else "skipped" if case.find("skipped") is not None else "passed"] += 1
    slowest = dict(sorted(seconds.items(), key=lambda entry: -entry[1])[:10])
    return {**counts, "failures": failures, "slowest": slowest}


def _told(output: str) -> dict[str, Any]:
    """From what pytest has written, where there is no report."""
    outcomes = re.findall(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = Counter(outcome for _, outcome in outcomes)
    failures = [{"test": name, "message": ""} for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {"passed": counts["PASSED"], "failed": len(failures), "skipped": counts["SKIPPED"], "failures": failures}


def _last_begun(output: str) -> str:
    begun = re.findall(r"^(\S+\.py::\S+)", output, re.MULTILINE)
    return begun[-1] if begun else ""
