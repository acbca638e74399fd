"""One running job: its id, the wish to stop it, its stages with their times, and the log line it leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdxl_worker.errors import Cancelled
from sdxl_worker.serving.progress import NoProgress, Progress
from sdxl_worker.serving.turns import Ticket

logger = logging.getLogger(__name__)


@dataclass
class JobRun:
    """What accompanies one job through its stages. `ticket` is its place in the queue for the device."""

    job_id: str
    ticket: Ticket
    progress: Progress = field(default_factory=NoProgress)
    milliseconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _started: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        """Ask the job to stop at its next step, chunk or stage; may be called from any thread."""
        self._stop.set()

    def should_stop(self) -> bool:
        """True once the job was asked to stop."""
        return self._stop.is_set()

    def check_stop(self) -> None:
        """Raise Cancelled when the job was asked to stop."""
        if self._stop.is_set():
            raise Cancelled("the job was stopped")

    def report_bytes(self, done: int, total: int | None) -> None:
        """Report a download's progress in bytes."""
        self.progress.update("downloading", bytes=done, total_bytes=total)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the milliseconds of `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1000 * (time.perf_counter() - start)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report and measure a stage; a stopped job does not enter it but raises Cancelled."""
        self.check_stop()
        self.progress.update(name)
        with self.measure(name):
            yield

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Hold the device: wait for this job's turn (raises Cancelled when stopped meanwhile), and pass it on."""
        if not self.ticket.is_first:
            self.progress.update("queued")
        with self.measure("queued"):
            self.ticket.wait(self.check_stop)
        try:
            yield
        finally:
            self.ticket.leave()

    def finish(self, outcome: str) -> None:
        """Leave the queue, end the progress reports, and log one line: outcome, milliseconds per stage, facts."""
        self.ticket.leave()
        with self.measure("last_update"):
            self.progress.close()
        stages = {name: round(spent, 1) for name, spent in self.milliseconds.items()}
        stages["total"] = round(1000 * (time.perf_counter() - self._started), 1)
        line = {"job": self.job_id, "outcome": outcome, "ms": stages, **self.facts}
        logger.info("job %s", json.dumps(line, default=str))
