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

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.job_run import JobRun
from sdxl_worker.logs import configure_logging
from sdxl_worker.lora.engine import AppliedLora, ParsedLora
from sdxl_worker.lora_entries import parse_lora_entries
from sdxl_worker.request import LoraScale
from sdxl_worker.serving import launch
from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

logger = logging.getLogger("handler")


@functools.cache
def _worker() -> Worker:
    return Worker(Settings.from_environment())


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One thread runs the jobs; with WORKER_CONCURRENCY=2 a second one fetches while the first holds the device."""
    return ThreadPoolExecutor(max(1, _worker().settings.worker_concurrency), thread_name_prefix="job")


@functools.cache
def _sdk_config() -> dict[str, Any]:
    return launch.sdk_config(_worker(), handler)


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in the job thread, so that RunPod can stop it and this process keeps talking meanwhile.

    A stopped job is awaited until its thread has really ended: only then does the SDK take the next one.
    """
    run = _worker().start_run(job)
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
    """The answer to a job; see Worker.run. Never raises."""
    return _worker().run(job, run)


def _load_loras(pipeline: Any, loras_config: Sequence[Any]) -> tuple[list[Path], list[LoraScale]]:
    """Local files and scales of a request's `loras` list, checked against the pipeline; malformed entries are left out.

    Raises FetchError and AssetFileError.
    """
    specs, warnings = parse_lora_entries(loras_config)
    for warning in warnings:
        logger.warning("%s", warning)
    run = _worker().start_run({})
    try:
        ready = _worker().ready_loras(pipeline, specs, run)
    finally:
        run.finish("loras only")
    return [lora.file.path for lora in ready], [lora.spec.scale for lora in ready]


def _apply_loras_to_pipeline(
    pipeline: Any, lora_paths: Sequence[Path | ParsedLora], lora_scales: Sequence[LoraScale | float]
) -> list[AppliedLora]:
    """Merge LoRAs (files, or what was read from them) into the weights, replacing what was merged before.

    Raises AssetFileError; the weights are then as they were.
    """
    engine = _worker().engine_of(pipeline)
    parsed = [lora if isinstance(lora, ParsedLora) else engine.read(Path(lora)) for lora in lora_paths]
    scales = [scale if isinstance(scale, LoraScale) else LoraScale.uniform(float(scale)) for scale in lora_scales]
    return engine.apply(list(zip(parsed, scales, strict=True)))


def _unload_loras_from_pipeline(pipeline: Any) -> None:
    """Put the pipeline's weights back, bit for bit; raises RestoreFailed."""
    _worker().engine_of(pipeline).restore()


def main() -> int:
    """Start the worker the way the command line and the environment ask for; the exit status."""
    import runpod.serverless as sdk

    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(launch.help_text(sdk.parser))
        return 0
    arguments, _ = sdk.parser.parse_known_args()
    try:
        worker = _worker()
        configure_logging(worker.settings.secrets)
        worker.mode = launch.mode_of(arguments)
        if launch.has_a_job(worker.mode, arguments):
            if worker.mode is Mode.LOCAL:
                launch.check_local_job(arguments)
            launch.get_ready(worker)
    except (ModelUnavailable, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    launch.register_checks(worker, sdk.register_fitness_check)
    try:
        sdk.start(_sdk_config())
    finally:
        # Once more at the very end: the SDK logs the whole answer of a local run.
        sys.stdout.writelines(f"Saved {path}\n" for path in worker.saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
