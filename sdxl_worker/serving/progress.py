"""Where a job stands: to RunPod as progress updates, on a terminal as a bar, in a test to nobody."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdxl_worker.job_run import Denoising, Downloading, ProgressEvent

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


class RunPodProgress:
    """Sends updates through the SDK: at most one a second, and never two at a time.

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

    def update(self, event: ProgressEvent) -> None:
        with self._lock:
            pause = MIN_SECONDS_BETWEEN_UPDATES if event.name == self._last_stage else MIN_SECONDS_BETWEEN_STAGES
            due = time.monotonic() - self._last_sent >= pause
            if self._closed or not due or (self._in_flight is not None and self._in_flight.is_alive()):
                return
            self._last_sent, self._last_stage = time.monotonic(), event.name
            try:
                self._in_flight = self._send(event.as_json())
            except Exception:
                # A job must not fail because its progress could not be told.
                logger.warning("progress update failed", exc_info=True)

    def _send(self, progress: dict[str, Any]) -> threading.Thread:
        """Start the SDK's update in a thread of ours: the SDK's own `progress_update` keeps its thread to itself."""
        from runpod.serverless.modules import rp_progress

        def post() -> None:
            try:
                rp_progress._thread_target(self._job, progress)
            except Exception:
                logger.warning("progress update failed", exc_info=True)

        thread = threading.Thread(target=post, name="progress", daemon=True)
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
