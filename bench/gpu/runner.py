"""Measures figures in child processes, one process for each group while nothing fails, until the time is used up.

A figure that fails, or takes far too long, costs its process and no other figure: the rest of its group goes on in a
new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.figure import COMPILED, DRY_SECONDS, PROCESSES, Figure
from bench.gpu.processes import end_with_all_started
from bench.gpu.store import FAILED, OK, ROOT, Store

# Starting a child: imports, and random weights on the device.
START_SECONDS = 30.0
# A figure may take this many times its estimate, and this many seconds more, before it is taken for hanging.
PATIENCE_TIMES, PATIENCE_SECONDS, DRY_PATIENCE_SECONDS = 3.0, 60.0, 300.0
LOG_TAIL = 4000
# What has a limit of its own is to reach that so many seconds before, and to tell what it has until then.
TELLING_SECONDS = 30.0
# What one figure compiles, to measure how long that takes, the others need not compile again.
COMPILED_CODE = str(Path(tempfile.gettempdir()) / "bench-gpu-compiled")


class ChildError(Exception):
    """The child said that it failed, ended without a word, or took too long; `traceback` has what it wrote last."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class Child:
    """One measuring process (`bench.gpu.child`) in a session of its own, so that what it starts ends with it."""

    def __init__(self, model: str, device: str, group: str) -> None:
        command = [sys.executable, "-m", "bench.gpu.child", "--model", model, "--device", device]
        command += ["--no-pipeline"] if group == PROCESSES else []
        command += ["--compiled-code", COMPILED_CODE] if group == COMPILED else []
        more = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            # With more, two busy processes are many times slower on a small machine.
            more |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **more, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._unread = b""

    def wait_until_ready(self, seconds: float) -> None:
        """Return once the pipeline is built; raises ChildError."""
        self._answer(seconds)

    def measure(self, figure: Figure, options: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The figure's result, which may take `seconds`; raises ChildError."""
        assert self._process.stdin is not None
        order = json.dumps({"measure": figure.measure, "options": options})
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(seconds)["result"]

    def stop(self) -> None:
        """End it and all that it has started."""
        end_with_all_started(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._log.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise ChildError(f"took longer than {seconds:.0f} s", self._written())
            # Not by the pipe's own readline, which would wait for the rest of a line.
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ChildError(f"its process ended with status {self._process.wait()}", self._written())
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"], answer["traceback"])
        return answer

    def _written(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - LOG_TAIL))
        return self._log.read().decode("utf-8", "replace")


class Runner:
    """Measures what is not there yet; `say` takes the lines that tell how far it is."""

    def __init__(self, store: Store, *, minutes: float, dry_run: bool, say: Callable[[str], None]) -> None:
        self._store, self._say, self._dry_run = store, say, dry_run
        self._started = time.monotonic()
        self._seconds = 60 * minutes
        self._start_seconds = DRY_SECONDS if dry_run else START_SECONDS
        self._patience_seconds = DRY_PATIENCE_SECONDS if dry_run else PATIENCE_SECONDS
        self.owed: dict[str, str] = {}  # by name, why it was not measured

    def estimate(self, figure: Figure) -> float:
        """Seconds that the figure will take, its process not counted."""
        return self._store.estimate(figure, DRY_SECONDS if self._dry_run else figure.seconds)

    def run(self, figures: Sequence[Figure]) -> None:
        """Measure these, and keep each result, or what failed, when it is there."""
        child: Child | None = None
        group = ""
        try:
            for number, figure in enumerate(figures, 1):
                if child is not None and group != figure.group:
                    child.stop()
                    child = None
                group = figure.group
                start = self._start_seconds if child is None and figure.group != PROCESSES else 0.0
                needed, left = start + self.estimate(figure), self._left()
                if needed > left:
                    self.owed[figure.name] = f"needs about {needed:.0f} s, and {max(0.0, left):.0f} s are left"
                    self._tell(number, figures, f"{figure.name}: owed, {self.owed[figure.name]}")
                    continue
                self._tell(number, figures, f"{figure.name}: {figure.title}, about {needed:.0f} s")
                child = self._measure(figure, child)
        finally:
            if child is not None:
                child.stop()

    def _measure(self, figure: Figure, child: Child | None) -> Child | None:
        """The child for the next figure; None when this one has cost it."""
        facts = self._store.facts
        about = {"device": facts["kind"], "model": facts["model"], "compiled_code": COMPILED_CODE}
        options = {**(figure.dry if self._dry_run else figure.full), **about}
        started = time.monotonic()
        try:
            if child is None:
                child = self._start(figure)
                started = time.monotonic()
            patience = self._patience(self.estimate(figure))
            if "limit_s" in options:
                options["limit_s"] = max(1.0, min(options["limit_s"], patience - TELLING_SECONDS))
            result = child.measure(figure, options, patience)
        except ChildError as error:
            if child is not None:
                child.stop()
            seconds = time.monotonic() - started
            self._store.write(figure, FAILED, seconds, options, error=str(error), traceback=error.traceback)
            self._say(f"    {figure.name}: FAILED after {seconds:.0f} s: {error}")
            return None
        seconds = time.monotonic() - started
        self._store.write(figure, OK, seconds, options, result=result)
        told = "; ".join(
            f"{goal.what}: {value:.4g}" for goal in figure.goals if (value := goal.value(result)) is not None
        )
        self._say(f"    {figure.name}: measured in {seconds:.0f} s{'; ' if told else ''}{told}")
        return child

    def _start(self, figure: Figure) -> Child:
        started = time.monotonic()
        facts = self._store.facts
        child = Child(facts["model"], facts["kind"], figure.group)
        try:
            child.wait_until_ready(self._patience(self._start_seconds))
        except ChildError:
            child.stop()
            raise
        if figure.group != PROCESSES:
            self._start_seconds = time.monotonic() - started
            self._say(f"    process of group {figure.group} ready in {self._start_seconds:.0f} s")
        return child

    def _patience(self, estimate: float) -> float:
        return max(1.0, min(self._left(), PATIENCE_TIMES * estimate + self._patience_seconds))

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._started)

    def _tell(self, number: int, figures: Sequence[Figure], text: str) -> None:
        spent = time.monotonic() - self._started
        self._say(f"[{number}/{len(figures)}  {_clock(spent)} of {_clock(self._seconds)}] {text}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
