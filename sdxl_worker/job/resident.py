"""What stays in this process from job to job: settings, pipeline, LoRA engine, health, the queue for the device."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.job.answers import answer_limit
from sdxl_worker.job.faults import Health
from sdxl_worker.job.jobs import JobRun
from sdxl_worker.job.progress import BarProgress, NoProgress, Progress, RunPodProgress
from sdxl_worker.job.turns import Turns
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from sdxl_worker.lora.engine import LoraEngine

# Where a local run saves its pictures, in the working folder.
LOCAL_OUTPUT = Path("output")


class Mode(enum.Enum):
    """How this process gets its jobs."""

    LIBRARY = "another program calls generate_image"
    LOCAL = "one job from --test_input or test_input.json"
    API = "the SDK's HTTP server"
    PRODUCTION = "RunPod's queue"


class Resident:
    """Loads the pipeline when it is first asked for; the LoRA engine only when the first LoRA is."""

    def __init__(self, settings: Settings, mode: Mode = Mode.LIBRARY) -> None:
        self.settings = settings
        self.mode = mode
        self.health = Health()
        self.turns = Turns()
        self.saved: list[Path] = []
        self._lock = threading.RLock()
        self._pipeline: StableDiffusionXLPipeline | None = None

    @property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """The resident pipeline; raises ModelUnavailable."""
        with self._lock:
            if self._pipeline is None:
                from sdxl_worker.pipeline import load_pipeline

                self._pipeline = load_pipeline(self.settings)
            return self._pipeline

    def engine_of(self, pipeline: StableDiffusionXLPipeline) -> LoraEngine:
        """The LoRA engine of `pipeline`."""
        from sdxl_worker.lora.engine import engine_for

        with self._lock:
            return engine_for(pipeline, self.settings.lora_ram_cache_gb)

    def start_run(self, job: dict[str, Any]) -> JobRun:
        """What accompanies a job that has just arrived; takes its place in the queue for the device."""
        reporters: dict[Mode, Callable[[], Progress]] = {
            Mode.LOCAL: BarProgress,
            Mode.PRODUCTION: lambda: RunPodProgress(job),
        }
        job_id = str(job.get("id") or "local")
        return JobRun(job_id, self.turns.ticket(), reporters.get(self.mode, NoProgress)())

    def answer_limit(self, job_id: str) -> int | None:
        """How many bytes an answer may have; None in a local run, which posts nothing."""
        return None if self.mode is Mode.LOCAL else answer_limit(job_id)
