"""RunPod's handler: a job goes in, an answer comes out. The only place where errors become JSON.

python handler.py --help
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL.Image import Image

from schemas import validate_request
from sdxl_worker.download.parallel import preload
from sdxl_worker.errors import Cancelled, ModelUnavailable, WorkerError
from sdxl_worker.job import launch
from sdxl_worker.job.answers import check_size, sendable
from sdxl_worker.job.delivery import deliver
from sdxl_worker.job.faults import as_worker_error
from sdxl_worker.job.input_image import fetch_input_image
from sdxl_worker.job.jobs import JobRun
from sdxl_worker.job.lora_entries import parse_lora_entries
from sdxl_worker.job.progress import preview_jpeg
from sdxl_worker.job.ready_lora import ReadyLora, make_ready
from sdxl_worker.job.resident import Mode, Resident
from sdxl_worker.job.upload import bucket_is_configured
from sdxl_worker.logs import configure_logging, current_job
from sdxl_worker.lora.engine import AppliedLora, ParsedLora
from sdxl_worker.pipeline import render, unread_prompt
from sdxl_worker.request import GenerationRequest, LoraScale, LoraSpec
from sdxl_worker.settings import Settings

logger = logging.getLogger("handler")


@functools.cache
def _resident() -> Resident:
    return Resident(Settings.from_environment())


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One thread runs the jobs; with WORKER_CONCURRENCY=2 a second one fetches while the first holds the device."""
    return ThreadPoolExecutor(max(1, _resident().settings.worker_concurrency), thread_name_prefix="job")


@functools.cache
def _sdk_config() -> dict[str, Any]:
    return launch.sdk_config(_resident(), handler)


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in the job thread, so that RunPod can stop it and this process keeps talking meanwhile.

    A stopped job is awaited until its thread has really ended: only then does the SDK take the next one.
    """
    run = _resident().start_run(job)
    context = contextvars.copy_context()
    future = asyncio.get_running_loop().run_in_executor(_threads(), context.run, generate_image, job, run)
    stopped = False
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            stopped = True
            run.cancel()
    if stopped:
        raise asyncio.CancelledError
    answer = future.result()
    if answer.get("refresh_worker"):
        # In the answer it only asks RunPod for a fresh worker; in the configuration it also ends this process.
        _sdk_config()["refresh_worker"] = True
    return answer


def generate_image(job: dict[str, Any], run: JobRun | None = None) -> dict[str, Any]:
    """The answer to a job: pictures, seed, LoRAs and warnings, or `{"error": "CODE: sentence"}`. Never raises.

    `run` accompanies a job that someone may stop or wants to follow.
    """
    job = job if isinstance(job, dict) else {}
    resident = _resident()
    run = run or resident.start_run(job)
    token = current_job.set(run.job_id)
    outcome = "ok"
    try:
        answer = sendable(_answer(job.get("input"), run, resident))
        check_size(answer, resident.answer_limit(run.job_id))
    except Exception as error:
        answer = _failure(error, resident)
        outcome = answer["error"].partition(":")[0]
    finally:
        run.finish(outcome)
        current_job.reset(token)
    return answer


def _failure(error: Exception, resident: Resident) -> dict[str, Any]:
    failure = as_worker_error(error)
    if failure is not error or failure.__cause__ is not None:
        logger.error("%s: %s", failure.code, failure, exc_info=error)
    elif not isinstance(failure, Cancelled):
        logger.warning("%s: %s", failure.code, failure)
    answer = sendable(failure.as_answer())
    if resident.health.failed(failure):
        answer["refresh_worker"] = True
    return answer


def _answer(raw_input: Any, run: JobRun, resident: Resident) -> dict[str, Any]:
    with run.measure("validating"):
        request = validate_request(raw_input)
        bucket_is_configured(resident.settings)
    pipeline = resident.pipeline
    image = fetch_input_image(request.image_url, resident.settings, run) if request.image_url else None
    ready = _ready_loras(pipeline, request.loras, run) if request.loras else []
    pictures, applied = _draw(pipeline, request, ready, image, run)
    images, warnings = deliver(pictures, request, [lora.used for lora in ready], run, resident)
    answer: dict[str, Any] = {"images": images, "image_url": images[0], "seed": request.seed}
    pairs = list(zip(ready, applied, strict=True))
    if request.loras_requested:
        answer["loras"] = [lora.as_json(done) for lora, done in pairs]
    warnings += unread_prompt(pipeline, request)
    warnings = [*request.warnings, *warnings, *(line for lora, done in pairs for line in lora.warnings(done))]
    return {**answer, "warnings": warnings} if warnings else answer


def _ready_loras(pipeline: Any, specs: Sequence[LoraSpec], run: JobRun) -> list[ReadyLora]:
    resident = _resident()
    return make_ready(specs, resident.settings, functools.partial(resident.engine_of, pipeline), run)


def _draw(
    pipeline: Any, request: GenerationRequest, ready: Sequence[ReadyLora], image: Image | None, run: JobRun
) -> tuple[list[Image], list[AppliedLora]]:
    """Render with the LoRAs merged in, and put the weights back whatever happens. Holds the device meanwhile."""
    on_step = functools.partial(_after_step, run, request.preview)
    with run.device(), _resident().health.watch():
        applied: list[AppliedLora] = []
        try:
            if ready:
                with run.measure("applying_loras"):
                    parsed, scales = [lora.parsed for lora in ready], [lora.spec.scale for lora in ready]
                    applied = _apply_loras_to_pipeline(pipeline, parsed, scales)
            with run.stage("denoising"):
                pictures = render(pipeline, request, init_image=image, on_step=on_step)
        finally:
            if ready:
                with run.measure("restoring"):
                    _unload_loras_from_pipeline(pipeline)
    return pictures, applied


def _after_step(run: JobRun, with_preview: bool, step: int, steps: int, latents: Any) -> None:
    run.check_stop()
    preview = {"preview": functools.partial(preview_jpeg, latents)} if with_preview else {}
    run.progress.update("denoising", step=step, steps=steps, **preview)


def _load_loras(pipeline: Any, loras_config: Sequence[Any]) -> tuple[list[Path], list[LoraScale]]:
    """Local files and scales of a request's `loras` list, checked against the pipeline; malformed entries are left out.

    Raises LoraDownloadError and LoraFileError.
    """
    specs, warnings = parse_lora_entries(loras_config)
    for warning in warnings:
        logger.warning("%s", warning)
    run = _resident().start_run({})
    try:
        ready = _ready_loras(pipeline, specs, run)
    finally:
        run.finish("loras only")
    return [lora.file.path for lora in ready], [lora.spec.scale for lora in ready]


def _apply_loras_to_pipeline(
    pipeline: Any, lora_paths: Sequence[Path | ParsedLora], lora_scales: Sequence[LoraScale | float]
) -> list[AppliedLora]:
    """Merge LoRAs (files, or what was read from them) into the weights, replacing what was merged before.

    Raises LoraFileError; the weights are then as they were.
    """
    engine = _resident().engine_of(pipeline)
    parsed = [lora if isinstance(lora, ParsedLora) else engine.read(Path(lora)) for lora in lora_paths]
    scales = [scale if isinstance(scale, LoraScale) else LoraScale.uniform(float(scale)) for scale in lora_scales]
    return engine.apply(list(zip(parsed, scales, strict=True)))


def _unload_loras_from_pipeline(pipeline: Any) -> None:
    """Put the pipeline's weights back, bit for bit; raises RestoreFailed."""
    _resident().engine_of(pipeline).restore()


def _preload() -> None:
    resident = _resident()
    for file in preload(resident.settings):
        try:
            resident.engine_of(resident.pipeline).read(file.path)
        except WorkerError as error:
            logger.error("LORA_PRELOAD: %s: %s", error.code, error)


def main() -> int:
    """Start the worker the way the command line and the environment ask for; the exit status."""
    import runpod.serverless as sdk

    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(launch.help_text(sdk.parser))
        return 0
    arguments, _ = sdk.parser.parse_known_args()
    try:
        resident = _resident()
        configure_logging(resident.settings.secrets)
        resident.mode = launch.mode_of(arguments)
        if launch.has_a_job(resident.mode, arguments):
            if resident.mode is Mode.LOCAL:
                launch.check_local_job(arguments)
            launch.get_ready(resident, _preload)
    except (ModelUnavailable, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    launch.register_checks(resident, sdk.register_fitness_check)
    try:
        sdk.start(_sdk_config())
    finally:
        # Once more at the very end: the SDK logs the whole answer of a local run.
        sys.stdout.writelines(f"Saved {path}\n" for path in resident.saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
