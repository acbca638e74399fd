"""The tests marked gpu, in a process of their own, with what came of each that did not pass."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu.figures import COMPILING_TESTS
from bench.gpu.store import ROOT

TAIL = 2000
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
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", "--color=no"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *files]
        started = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.limit_s)
            status, output = str(done.returncode), done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, output = f"stopped after {options.limit_s} s", _text(error.stdout) + _text(error.stderr)
        seconds = time.perf_counter() - started
        counts = _reported(report) if report.exists() else _told(output)
    return {"status": status, "pytest_s": seconds, "files": files, **counts, "output": output[-TAIL:]}


def _reported(report: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    failures, seconds = [], {}
    for case in ElementTree.parse(report).iter("testcase"):
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
    """From what pytest has written, where it did not come to its end: that is one more failure."""
    outcomes = re.findall(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = Counter(outcome for _, outcome in outcomes)
    failures = [{"test": name, "message": ""} for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    begun = re.findall(r"^(\S+::\S+)", output, re.MULTILINE)
    failures.append({"test": begun[-1] if begun else "", "message": "pytest did not come to its end here"})
    return {"passed": counts["PASSED"], "failed": len(failures), "skipped": counts["SKIPPED"], "failures": failures}


def _text(output: Any) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
