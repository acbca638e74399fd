"""One running job: its id, the wish to stop it, its stages with their times, and the log line it leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from sdxl_worker.errors import Cancelled
from sdxl_worker.logs import PLAIN

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A stage began that has no numbers, or none yet."""

    name: str

    def as_json(self) -> dict[str, Any]:
        """What RunPod is told."""
        return {"stage": self.name}


@dataclass(frozen=True)
class Downloading:
    """Bytes of all files that the job waits for; `total_bytes` is None until every one of them is known."""

    bytes: int
    total_bytes: int | None
    name: ClassVar[str] = "downloading"

    def as_json(self) -> dict[str, Any]:
        """What RunPod is told."""
        return {"stage": self.name, "bytes": self.bytes, "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Denoising:
    """`step` of `steps` is done; `preview` begins a picture of where it stands, if one was asked for.

    What `preview` gives makes the data URI, in any thread.
    """

    step: int
    steps: int
    preview: Callable[[], Callable[[], str]] | None = None
    name: ClassVar[str] = "denoising"

    def as_json(self) -> dict[str, Any]:
        """What RunPod is told, without the preview."""
        return {"stage": self.name, "step": self.step, "steps": self.steps}


ProgressEvent = Stage | Downloading | Denoising


class Progress(Protocol):
    """Takes a job's events from any thread; never raises into the job. The sinks are in `serving.progress`."""

    def update(self, event: ProgressEvent) -> None:
        """Show the event, or leave it out when it comes too soon after another."""

    def close(self) -> None:
        """Take no more events, and return only when none is on its way any more."""


class NoProgress:
    """Tells nobody."""

    def update(self, event: ProgressEvent) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Place(Protocol):
    """A job's place in the queue for the device, which is `serving.turns`."""

    @property
    def is_first(self) -> bool:
        """True when it is this job's turn."""

    def wait(self, check_stop: Callable[[], None]) -> None:
        """Return when all earlier jobs have left; `check_stop` may raise meanwhile."""

    def leave(self) -> None:
        """Let the next one pass; leaving twice does no harm."""


@dataclass
class JobRun:
    """What accompanies one job through its stages."""

    job_id: str
    place: Place
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
        self.progress.update(Downloading(done, total))

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the milliseconds of `name`, less what is measured inside."""
        others, start = sum(self.milliseconds.values()), time.perf_counter()
        try:
            yield
        finally:
            spent = 1000 * (time.perf_counter() - start) - (sum(self.milliseconds.values()) - others)
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent

    def timed(self, change: AbstractContextManager[T], entering: str, leaving: str) -> AbstractContextManager[T]:
        """`change`, with the time that it takes to enter and to leave it measured under these names."""
        return _Timed(self, change, entering, leaving)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report and measure a stage; a stopped job does not enter it but raises Cancelled."""
        self.check_stop()
        self.progress.update(Stage(name))
        with self.measure(name):
            yield

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Hold the device: wait for this job's turn (raises Cancelled when stopped meanwhile), and pass it on."""
        if not self.place.is_first:
            self.progress.update(Stage("queued"))
        with self.measure("queued"):
            self.place.wait(self.check_stop)
        try:
            yield
        finally:
            self.place.leave()

    def finish(self, outcome: str) -> None:
        """Leave the queue, end the progress reports, and log one line: outcome, milliseconds per stage, facts."""
        self.place.leave()
        with self.measure("last_update"):
            self.progress.close()
        stages = {name: round(spent, 1) for name, spent in self.milliseconds.items()}
        stages["total"] = round(1000 * (time.perf_counter() - self._started), 1)
        line = {"job": self.job_id, "outcome": outcome, "ms": stages, **self.facts}
        logger.info("%s", json.dumps(line, default=str), extra={PLAIN: True})


@dataclass(frozen=True)
class _Timed(AbstractContextManager[T]):
    run: JobRun
    change: AbstractContextManager[T]
    entering: str
    leaving: str

    def __enter__(self) -> T:
        with self.run.measure(self.entering):
            return self.change.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        with self.run.measure(self.leaving):
            return self.change.__exit__(*error)
