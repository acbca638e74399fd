"""Where a job stands: to RunPod as progress updates, on a terminal as a bar, in a test to nobody."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# RunPod shows the newest update only, and each one costs a thread and a connection.
MIN_SECONDS_BETWEEN_UPDATES = 1.0
# A new stage is worth telling sooner.
MIN_SECONDS_BETWEEN_STAGES = 0.2
# The SDK tries an update three times with about two seconds between; after this the answer goes out all the same.
MAX_SECONDS_IN_FLIGHT = 30.0
PREVIEW_QUALITY = 70

# SDXL latents to RGB, one row per colour, and the offsets.
# https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space
_LATENT_TO_RGB = ((60.0, -60.0, 25.0, -70.0), (60.0, -5.0, 15.0, -50.0), (60.0, 10.0, -5.0, -35.0))
_RGB_OFFSET = (150.0, 140.0, 130.0)


class Progress(Protocol):
    """Takes a job's updates from any thread; never raises into the job."""

    def update(self, stage: str, **facts: Any) -> None:
        """Report a stage with its numbers; a value that is callable is only called when the update is sent."""

    def close(self) -> None:
        """Take no more updates, and return only when none is on its way any more."""


class NoProgress:
    """Reports to nobody."""

    def update(self, stage: str, **facts: Any) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class RunPodProgress:
    """Sends updates through the SDK: at most one a second, and never two at a time.

    An update that arrives after the answer leaves the job IN_PROGRESS for ever
    (https://github.com/runpod/runpod-python/issues/250), so `close` waits for the one on its way.
    """

    _starting = threading.Lock()

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._closed = False
        self._last_sent = -MIN_SECONDS_BETWEEN_UPDATES
        self._last_stage = ""
        self._in_flight: list[threading.Thread] = []

    def update(self, stage: str, **facts: Any) -> None:
        with self._lock:
            pause = MIN_SECONDS_BETWEEN_UPDATES if stage == self._last_stage else MIN_SECONDS_BETWEEN_STAGES
            due = time.monotonic() - self._last_sent >= pause
            if self._closed or not due or any(thread.is_alive() for thread in self._in_flight):
                return
            self._last_sent, self._last_stage = time.monotonic(), stage
            try:
                made = {name: value() if callable(value) else value for name, value in facts.items()}
                self._in_flight = self._send({"stage": stage, **made})
            except Exception:
                # A job must not fail because its progress could not be told.
                logger.warning("progress update failed", exc_info=True)

    def _send(self, progress: dict[str, Any]) -> list[threading.Thread]:
        """Start the SDK's update and return its thread, which the SDK keeps to itself."""
        from runpod.serverless import progress_update

        with RunPodProgress._starting:
            before = set(threading.enumerate())
            progress_update(self._job, progress)
            # Named after the SDK's target function; a test holds the SDK to it.
            return [
                thread
                for thread in set(threading.enumerate()) - before
                if thread.daemon and thread.name.endswith("(_thread_target)")
            ]

    def close(self) -> None:
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + MAX_SECONDS_IN_FLIGHT
        for thread in self._in_flight:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("a progress update is still on its way after %g s", MAX_SECONDS_IN_FLIGHT)


class BarProgress:
    """A tqdm bar on stderr: one for the steps, with the stage in front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: tqdm | None = None

    def update(self, stage: str, **facts: Any) -> None:
        with self._lock:
            if self._bar is None:
                self._bar = tqdm(total=None, unit="step", dynamic_ncols=True)
            bar = self._bar
            bar.set_description(stage, refresh=False)
            if "steps" in facts:
                bar.total, bar.n = facts["steps"], facts["step"]
            total = f" of {facts['total_bytes'] / 1e6:.1f}" if facts.get("total_bytes") else ""
            bar.set_postfix_str(f"{facts['bytes'] / 1e6:.1f}{total} MB" if "bytes" in facts else "", refresh=False)
            bar.refresh()

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()


def preview_jpeg(latents: torch.Tensor) -> str:
    """A rough picture of the first of `latents` (n, 4, h, w) as a JPEG data URI of w x h pixels."""
    import torch
    from PIL import Image

    first = latents[0].detach().float()
    weights = torch.tensor(_LATENT_TO_RGB, device=first.device)
    offset = torch.tensor(_RGB_OFFSET, device=first.device)[:, None, None]
    colours = torch.einsum("cl,lhw->chw", weights, first) + offset
    pixels = colours.nan_to_num(0.0).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
