"""The worker: what lives as long as the process, and the way of one job through it."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import Cancelled, WorkerError
from sdxl_worker.generate.input_image import fetch_input_image
from sdxl_worker.job_run import Denoising, JobRun, NoProgress, Progress
from sdxl_worker.kinds import LORA
from sdxl_worker.logs import current_job
from sdxl_worker.lora.engine import AppliedLora, LoraEngine
from sdxl_worker.lora.ready import ReadyLora, make_ready
from sdxl_worker.request import GenerationRequest, LoraSpec
from sdxl_worker.serving.answers import answer_limit, check_size, sendable
from sdxl_worker.serving.delivery import deliver
from sdxl_worker.serving.faults import Health, as_worker_error
from sdxl_worker.serving.mode import Mode
from sdxl_worker.serving.progress import BarProgress, RunPodProgress, preview_jpeg
from sdxl_worker.serving.turns import Turns
from sdxl_worker.serving.upload import bucket_is_configured
from sdxl_worker.settings import Settings
from sdxl_worker.validation import validate_request

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)


class Worker:
    """Settings, assets, the resident pipeline with its LoRA engine, health, the queue for the device.

    Loads the pipeline when it is first asked for; the LoRA engine only when the first LoRA is.
    """

    def __init__(self, settings: Settings, mode: Mode = Mode.LIBRARY) -> None:
        self.settings = settings
        self.mode = mode
        self.assets = AssetStore(settings)
        self.health = Health()
        self.turns = Turns()
        self.saved: list[Path] = []
        self._lock = threading.RLock()
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._engines: weakref.WeakKeyDictionary[Any, LoraEngine] = weakref.WeakKeyDictionary()

    @property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """The resident pipeline; raises ModelUnavailable."""
        with self._lock:
            if self._pipeline is None:
                from sdxl_worker.generate.load import load_pipeline

                self._pipeline = load_pipeline(self.settings)
            return self._pipeline

    def engine_of(self, pipeline: StableDiffusionXLPipeline) -> LoraEngine:
        """The one LoRA engine of `pipeline`."""
        with self._lock:
            if pipeline not in self._engines:
                self._engines[pipeline] = LoraEngine(pipeline, int(self.settings.lora_ram_cache_gb * 2**30))
            return self._engines[pipeline]

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

    def run(self, job: dict[str, Any], run: JobRun | None = None) -> dict[str, Any]:
        """The answer to a job: pictures, seed, LoRAs and warnings, or `{"error": "CODE: sentence"}`. Never raises.

        `run` accompanies a job that someone may stop or wants to follow.
        """
        job = job if isinstance(job, dict) else {}
        run = run or self.start_run(job)
        token = current_job.set(run.job_id)
        outcome = "ok"
        try:
            answer = sendable(self._answer(job.get("input"), run))
            check_size(answer, self.answer_limit(run.job_id))
        except Exception as error:
            answer = self._failure(error)
            outcome = answer["error"].partition(":")[0]
        finally:
            run.finish(outcome)
            current_job.reset(token)
        return answer

    def preload(self) -> None:
        """Make every LORA_PRELOAD reference ready; one that fails is logged and left out."""
        references = [text.strip() for text in self.settings.lora_preload.split(",") if text.strip()]
        for file in self.assets.preload(references, LORA):
            try:
                self.engine_of(self.pipeline).read(file.path)
            except WorkerError as error:
                logger.error("LORA_PRELOAD: %s: %s", error.code, error)

    def ready_loras(self, pipeline: Any, specs: Sequence[LoraSpec], run: JobRun) -> list[ReadyLora]:
        """The request's LoRAs, fetched, checked and read; raises FetchError, AssetFileError and Cancelled."""
        return make_ready(specs, self.assets, functools.partial(self.engine_of, pipeline), run)

    def _failure(self, error: Exception) -> dict[str, Any]:
        failure = as_worker_error(error)
        if failure is not error or failure.__cause__ is not None:
            logger.error("%s: %s", failure.code, failure, exc_info=error)
        elif not isinstance(failure, Cancelled):
            logger.warning("%s: %s", failure.code, failure)
        answer = sendable(failure.as_answer())
        if self.health.failed(failure):
            answer["refresh_worker"] = True
        return answer

    def _answer(self, raw_input: Any, run: JobRun) -> dict[str, Any]:
        from sdxl_worker import prompts

        with run.measure("validating"):
            request = validate_request(raw_input)
            bucket_is_configured(self.settings)
        pipeline = self.pipeline
        image = fetch_input_image(request.image_url, self.settings, run) if request.image_url else None
        ready = self.ready_loras(pipeline, request.loras, run) if request.loras else []
        pictures, applied = self._draw(pipeline, request, ready, image, run)
        images, warnings = deliver(pictures, request, [lora.used for lora in ready], run, self)
        answer: dict[str, Any] = {"images": images, "image_url": images[0], "seed": request.seed}
        pairs = list(zip(ready, applied, strict=True))
        if request.loras_requested:
            answer["loras"] = [lora.as_json(done) for lora, done in pairs]
        warnings += prompts.unread(pipeline, request)
        warnings = [*request.warnings, *warnings, *(line for lora, done in pairs for line in lora.warnings(done))]
        return {**answer, "warnings": warnings} if warnings else answer

    def _draw(
        self,
        pipeline: Any,
        request: GenerationRequest,
        ready: Sequence[ReadyLora],
        image: Image | None,
        run: JobRun,
    ) -> tuple[list[Image], list[AppliedLora]]:
        """Render with the LoRAs merged in, and put the weights back whatever happens. Holds the device meanwhile."""
        from sdxl_worker.generate.render import render

        on_step = functools.partial(_after_step, run, request.preview)
        applied: list[AppliedLora] = []
        with run.device(), self.health.watch(), ExitStack() as changes:
            if ready:
                with run.measure("applying_loras"):
                    loras = [(lora.parsed, lora.spec.scale) for lora in ready]
                    applied = changes.enter_context(self.engine_of(pipeline).applied(loras))
            with run.stage("denoising"):
                pictures = render(pipeline, request, init_image=image, on_step=on_step)
            with run.measure("restoring"):
                changes.close()
        return pictures, applied


def _after_step(run: JobRun, with_preview: bool, step: int, steps: int, latents: Any) -> None:
    run.check_stop()
    preview = functools.partial(preview_jpeg, latents) if with_preview else None
    run.progress.update(Denoising(step, steps, preview))
