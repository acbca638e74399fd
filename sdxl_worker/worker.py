"""The worker: what lives as long as the process, and the way of one job through it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.assets.store import AssetStore
from sdxl_worker.drawing import draw
from sdxl_worker.errors import Cancelled, ModelUnavailable, OutOfMemory
from sdxl_worker.generate.infotext import model_name
from sdxl_worker.generate.prepare import inspected, prepare
from sdxl_worker.job_run import JobRun, NoProgress, Progress
from sdxl_worker.kinds import EMBEDDING, LORA
from sdxl_worker.logs import current_job
from sdxl_worker.lora.engine import AppliedLora, LoraEngine
from sdxl_worker.lora.parsed import ParsedLora
from sdxl_worker.lora.ready import make_ready
from sdxl_worker.memory import free_memory, import_libraries
from sdxl_worker.prompts.lora_tags import with_lora_tags
from sdxl_worker.request import GenerationRequest, LoraScale
from sdxl_worker.request.lora_entries import parse_lora_entries
from sdxl_worker.request.refinement import refinement_of
from sdxl_worker.request.validation import validate_request
from sdxl_worker.resident import Resident
from sdxl_worker.serving.answers import answer_limit, check_size, json_size, sendable
from sdxl_worker.serving.delivery import deliver
from sdxl_worker.serving.faults import Health, as_worker_error
from sdxl_worker.serving.fitness import checks, startup_line
from sdxl_worker.serving.mode import Mode
from sdxl_worker.serving.progress import BarProgress, RunPodProgress
from sdxl_worker.serving.turns import Turns
from sdxl_worker.serving.upload import bucket_is_configured
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


logger = logging.getLogger(__name__)


class Worker:
    """Settings, assets, the resident pipeline with its LoRA engine, health, the queue for the device."""

    def __init__(self, settings: Settings, mode: Mode = Mode.LIBRARY) -> None:
        self.settings = settings
        self.mode = mode
        self.assets = AssetStore(settings)
        self.health = Health()
        self.turns = Turns()
        self.saved: list[Path] = []
        self.resident = Resident(settings)

    @property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """The resident pipeline; raises ModelUnavailable."""
        return self.resident.pipeline

    def engine_of(self, pipeline: StableDiffusionXLPipeline) -> LoraEngine:
        """The one LoRA engine of `pipeline`."""
        return self.resident.engine_of(pipeline)

    def get_ready(self, began: float | None = None) -> None:
        """Everything that comes before the first job: start-up line, cache folder, model, preloaded LoRAs.

        `began` is when the process did, by time.perf_counter. Raises ModelUnavailable; only on RunPod's queue is that
        left for the fitness checks, which tell RunPod.
        """
        marks = [time.perf_counter() if began is None else began]
        logger.info("%s", startup_line(self.settings))
        self.assets.prepare(LORA)
        try:
            import_libraries()
            marks.append(time.perf_counter())
            _ = self.pipeline
            marks.append(time.perf_counter())
            self.preload()
            marks.append(time.perf_counter())
            spent = [after - before for before, after in itertools.pairwise(marks)]
            line = "ready after %.2f s: imports %.2f, base model %.2f, LoRAs %.2f"
            logger.info(line, marks[-1] - marks[0], *spent)
        except ModelUnavailable as error:
            if self.mode is not Mode.PRODUCTION:
                raise
            logger.error("%s: %s", error.code, error)
        # What loading has made stays for good as well.
        gc.collect()
        gc.freeze()

    def preload(self) -> None:
        """Make every LORA_PRELOAD reference ready and fetch those of EMBEDDING_PRELOAD.

        One that fails, however it does, is logged and left out.
        """
        self.assets.preload(_listed(self.settings.embedding_preload), EMBEDDING)
        references = _listed(self.settings.lora_preload)
        for file in self.assets.preload(references, LORA) if references else ():
            try:
                with LORA.own_codes():
                    self.engine_of(self.pipeline).read(file.path)
            except ModelUnavailable:
                raise
            except Exception as error:
                failure = as_worker_error(error)
                trace = None if failure is error else error
                logger.error("LORA_PRELOAD: %s: %s: %s", file.reference, failure.code, failure, exc_info=trace)

    def checks(self) -> list[functools.partial[None]]:
        """What has to pass before the first job on RunPod; each raises UnhealthyWorker."""
        return checks(self.settings, lambda: self.pipeline, lambda: self.resident.refiner, self.resident.attention)

    def close(self) -> None:
        """Let go of the pipeline and all that was read for it; the next job would load it again.

        Of a lost device's nothing, nor when the process ends: CUDA would end it by SIGABRT over page-locked memory.
        """
        if self.health.is_lost:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            return
        self.resident.close()

    def start_run(self, job: Any) -> JobRun:
        """What accompanies a job that has just arrived; takes its place in the queue for the device."""
        job = job if isinstance(job, dict) else {}
        reporters: dict[Mode, Callable[[], Progress]] = {
            Mode.LOCAL: BarProgress,
            Mode.PRODUCTION: lambda: RunPodProgress(job),
        }
        job_id = job.get("id")
        # RunPod's is a string; the text of another value could be of any size, or too deep to be made.
        job_id = job_id if isinstance(job_id, str) and job_id else "local"
        return JobRun(job_id, self.turns.ticket(), reporters.get(self.mode, NoProgress)())

    def answer_limit(self, job_id: str) -> int | None:
        """How many bytes an answer may have; None in a local run, which posts nothing."""
        return None if self.mode is Mode.LOCAL else answer_limit(job_id)

    def run(self, job: Any, run: JobRun | None = None) -> dict[str, Any]:
        """The answer to a job: pictures, seed, LoRAs and warnings, or `{"error": "CODE: sentence"}`. Never raises.

        `run` accompanies a job that someone may stop or wants to follow.
        """
        run = run or self.start_run(job)
        token = current_job.set(run.job_id)
        outcome = "ok"
        try:
            answer = sendable(self._answer(job.get("input") if isinstance(job, dict) else None, run))
            check_size(answer, self.answer_limit(run.job_id))
        except Exception as error:
            answer = self._failure(error)
            outcome = answer["error"].partition(":")[0]
        finally:
            run.finish(outcome)
            current_job.reset(token)
        return answer

    def load_loras(self, pipeline: Any, entries: Sequence[Any]) -> tuple[list[Path], list[LoraScale]]:
        """Local files and scales of a request's `loras`, checked against `pipeline`; malformed entries are left out.

        Their `start` and `end` do not count: `apply_loras` merges for all steps. Raises FetchError and AssetFileError.
        """
        specs, warnings = parse_lora_entries(entries)
        for warning in warnings:
            logger.warning("%s", warning)
        run = self.start_run({})
        try:
            ready = make_ready(specs, self.assets, lambda: self.engine_of(pipeline), run)
        finally:
            run.finish("loras only")
        return [lora.file.path for lora in ready], [lora.spec.scale for lora in ready]

    def apply_loras(
        self, pipeline: Any, loras: Sequence[Path | ParsedLora], scales: Sequence[LoraScale | float]
    ) -> list[AppliedLora]:
        """Merge LoRAs (files, or what was read from them) into the weights, replacing what was merged before.

        Raises AssetFileError; the weights are then as they were.
        """
        engine = self.engine_of(pipeline)
        parsed = [lora if isinstance(lora, ParsedLora) else engine.read(Path(lora)) for lora in loras]
        wanted = [scale if isinstance(scale, LoraScale) else LoraScale.uniform(float(scale)) for scale in scales]
        return engine.apply(list(zip(parsed, wanted, strict=True)))

    def _failure(self, error: Exception) -> dict[str, Any]:
        """The answer to a job that failed; the log gets a line, and a traceback when the worker is at fault."""
        failure = as_worker_error(error)
        if isinstance(failure, OutOfMemory):
            free_memory(error)
        if isinstance(failure, Cancelled):
            pass
        elif failure.caller_at_fault:
            logger.warning("%s: %s", failure.code, failure)
        else:
            unforeseen = failure is not error or failure.__cause__ is not None
            logger.error("%s: %s", failure.code, failure, exc_info=error if unforeseen else None)
        return sendable(failure.as_answer())

    def _answer(self, raw_input: Any, run: JobRun) -> dict[str, Any]:
        with run.measure("validating"):
            request = self._request(raw_input)
            bucket_is_configured(self.settings)
        pipeline = self.pipeline
        if request.inspect_prompt:
            return inspected(request, pipeline, self.assets, run)
        # Before anything is read for it: page-locked memory is not to be had of a lost device either.
        self.health.check()
        prepared = prepare(request, pipeline, self.assets, lambda: self.engine_of(pipeline), run)
        engine = self.engine_of(pipeline) if prepared.loras else None
        pictures, applied = draw(prepared, pipeline, engine, self.resident, self.health, run)
        answer = {"images": [""] * len(pictures), "image_url": "", **prepared.facts(applied)}
        warnings = prepared.warnings(applied)
        limit = self.answer_limit(run.job_id)
        room = None if limit is None else limit - json_size({**answer, "warnings": warnings})
        refiner, used = self.resident.refiner, prepared.used
        if refiner is not None and refinement_of(prepared.request) is not None:
            # Waits for the refiner's hash, which its first jobs may have to.
            used = dataclasses.replace(used, refiner=refiner.title)
        delivered = deliver(
            pictures, prepared.request, used, run, self.settings, self.mode, room, self.resident.model_hash
        )
        self.saved += delivered.saved
        answer |= {"images": delivered.images, "image_url": delivered.images[0]}
        warnings += delivered.warnings
        return {**answer, "warnings": warnings} if warnings else answer

    def _request(self, raw_input: Any) -> GenerationRequest:
        """The validated request, with the worker's own prompt syntax where it names none, and with its lora tags."""
        request = validate_request(raw_input, model_name(self.settings.refiner_id))
        if request.prompt_syntax is None:
            request = dataclasses.replace(request, prompt_syntax=self.settings.prompt_syntax)
        return with_lora_tags(request)


def _listed(setting: str) -> list[str]:
    """The references of a comma-separated setting."""
    return [text.strip() for text in setting.split(",") if text.strip()]
