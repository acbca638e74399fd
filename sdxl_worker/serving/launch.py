"""Start the process: help, logging, what has to be ready before the first job, and the SDK's configuration."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.serving.fitness import CHECKS, startup_line
from sdxl_worker.serving.mode import Mode
from sdxl_worker.serving.sdk_loop import leave_promptly, retry_dropped_connections, running_scaler
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from sdxl_worker.worker import Worker

logger = logging.getLogger(__name__)

_USAGE = """SDXL with per-request LoRAs, as a RunPod serverless worker.

  python handler.py --test_input '{"input": {"prompt": "a lighthouse at dusk"}}'   one job; pictures go to output/
  python handler.py                                                                the job in test_input.json
  python handler.py --rp_serve_api                                                 RunPod's API on localhost:8000
  MODEL_ID=tiny python handler.py ...                                              without any download

On RunPod the same command takes jobs from the endpoint's queue. Environment variables (README has more about each):
"""


def help_text(sdk_parser: argparse.ArgumentParser) -> str:
    """What --help prints: the ways to start, the environment variables, the SDK's own options."""
    variables = "\n".join(
        f"  {entry.metadata['name']:25} {entry.metadata['meaning']}"
        + (f" (default {entry.default})" if str(entry.default) and entry.repr else "")
        for entry in fields(Settings)
    )
    options = sdk_parser.format_help().partition("options:")[2].strip("\n")
    return f"{_USAGE}{variables}\n\nOptions of the RunPod SDK:\n{options}\n"


def mode_of(arguments: argparse.Namespace) -> Mode:
    """How the SDK will get its jobs with these of its arguments, and this environment."""
    if arguments.rp_serve_api or int(os.environ.get("RUNPOD_REALTIME_PORT", "0")):
        return Mode.API
    if arguments.test_input or os.environ.get("RUNPOD_WEBHOOK_GET_JOB") is None:
        return Mode.LOCAL
    return Mode.PRODUCTION


def has_a_job(mode: Mode, arguments: argparse.Namespace) -> bool:
    """False for a local run without a test input, which the SDK ends at once."""
    return mode is not Mode.LOCAL or bool(arguments.test_input) or Path("test_input.json").exists()


def check_local_job(arguments: argparse.Namespace) -> None:
    """Raise ValueError, in one sentence, when a local run's job is not JSON with an `input`."""
    name, text = "--test_input", arguments.test_input
    if not text:
        name, text = "test_input.json", Path("test_input.json").read_text(encoding="utf-8", errors="replace")
    try:
        job = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(job, dict) or job.get("input") is None:
        raise ValueError(f'{name} has no "input"; it should look like {{"input": {{"prompt": "a lighthouse"}}}}')


def get_ready(worker: Worker) -> None:
    """Everything that comes before the first job: start-up line, cache folder, model, preloaded LoRAs.

    Raises ModelUnavailable; only on RunPod's queue is that left for the fitness checks, which tell RunPod.
    """
    logger.info("%s", startup_line(worker))
    worker.assets.prepare()
    try:
        _ = worker.pipeline
        worker.preload()
    except ModelUnavailable:
        if worker.mode is not Mode.PRODUCTION:
            raise
        logger.exception("the base model is not available")
    # What the libraries have made so far stays for good: looking through it again in every full collection costs a job
    # some 0.3 s.
    gc.collect()
    gc.freeze()


def register_checks(worker: Worker, register: Callable[[Callable[[], None]], Any]) -> None:
    """Hand our fitness checks to the SDK, which runs them on RunPod before it takes a job."""
    for check in CHECKS:
        register(functools.wraps(check)(functools.partial(check, worker)))


def sdk_config(worker: Worker, handler: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The configuration for runpod.serverless.start."""

    def concurrency(_current: int) -> int:
        # The SDK calls this first of all in its running loop: the earliest moment at which that loop can be had.
        if (scaler := running_scaler()) is not None:
            leave_promptly(scaler)
        return max(1, worker.settings.worker_concurrency)

    retry_dropped_connections()
    return {"handler": handler, "concurrency_modifier": concurrency}
