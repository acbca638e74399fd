"""Where a job stands: to RunPod as progress updates, on a terminal as a bar, in a test to nobody."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from sdxl_worker.job_run import Denoising, Downloading, ProgressEvent

logger = logging.getLogger(__name__)

# RunPod shows the newest update only, and each one costs a thread and a connection.
MIN_SECONDS_BETWEEN_UPDATES = 1.0
# A new stage is worth telling sooner.
MIN_SECONDS_BETWEEN_STAGES = 0.2
# The SDK tries an update three times with about two seconds between; after this the answer goes out all the same.
MAX_SECONDS_IN_FLIGHT = 30.0


class RunPodProgress:
    """Sends updates through the SDK: at most one a second, and never two at a time, previews included.

    An update that arrives after the answer leaves the job IN_PROGRESS for ever
    (https://github.com/runpod/runpod-python/issues/250), so `close` waits for the one on its way.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._closed = False
        self._last_sent = -MIN_SECONDS_BETWEEN_UPDATES
        self._last_stage = ""
        self._in_flight: threading.Thread | None = None
        self._draws_previews = True
        self._failed_preview: Callable[[], str] | None = None

    def update(self, event: ProgressEvent) -> None:
        with self._lock:
            pause = MIN_SECONDS_BETWEEN_UPDATES if event.name == self._last_stage else MIN_SECONDS_BETWEEN_STAGES
            due = time.monotonic() - self._last_sent >= pause
            if self._closed or not due or (self._in_flight is not None and self._in_flight.is_alive()):
                return
            self._last_sent, self._last_stage = time.monotonic(), event.name
            try:
                self._in_flight = self._send(event.as_json(), self._begun_preview(event))
            except Exception:
                # A job must not fail because its progress could not be told.
                logger.warning("progress update failed", exc_info=True)

    def _begun_preview(self, event: ProgressEvent) -> Callable[[], str] | None:
        """What makes the event's preview; None where it has none, or one of the job's has failed."""
        if not isinstance(event, Denoising) or event.preview is None or not self._draws_previews:
            return None
        try:
            return event.preview()
        except Exception:
            self._preview_failed()
            return None

    def _preview_failed(self) -> None:
        # The next one would fail as well, once a second.
        self._draws_previews = False
        logger.warning("a preview failed; this job gets no more of them", exc_info=True)

    def _send(self, progress: dict[str, Any], preview: Callable[[], str] | None) -> threading.Thread:
        """Start the SDK's update in a thread of ours: the SDK's own `progress_update` keeps its thread to itself.

        The preview is finished there, while the run goes on; one that the job's end overtakes is not sent any more.
        """
        from runpod.serverless.modules import rp_progress

        def post() -> None:
            try:
                if preview is not None:
                    progress["preview"] = preview()
                    if self._closed:
                        return
            except Exception:
                # Kept as long as the job's error may be: a lost device takes no page-locked memory back.
                self._failed_preview = preview
                self._preview_failed()
            try:
                rp_progress._thread_target(self._job, progress)
            except Exception:
                logger.warning("progress update failed", exc_info=True)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(post,), name="progress", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._in_flight is not None:
            self._in_flight.join(MAX_SECONDS_IN_FLIGHT)
            if self._in_flight.is_alive():
                logger.warning("a progress update is still on its way after %g s", MAX_SECONDS_IN_FLIGHT)


class BarProgress:
    """A tqdm bar on stderr: the stage in front, then steps or bytes where the stage has them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: tqdm | None = None

    def update(self, event: ProgressEvent) -> None:
        with self._lock:
            if self._bar is None:
                # Stages have no numbers of their own: without steps the bar is the stage's name.
                self._bar = tqdm(desc=event.name, total=None, bar_format="{desc}{postfix}", dynamic_ncols=True)
            bar = self._bar
            bar.set_description_str(event.name, refresh=False)
            if isinstance(event, Denoising):
                bar.bar_format, bar.unit = None, "step"
                bar.total, bar.n = event.steps, event.step
            done = ""
            if isinstance(event, Downloading):
                total = f" of {event.total_bytes / 1e6:.1f}" if event.total_bytes else ""
                done = f"{event.bytes / 1e6:.1f}{total} MB"
            bar.set_postfix_str(done, refresh=False)
            bar.refresh()

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
