"""How a process is started: its help, what its arguments and RunPod's variables mean, its checks."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from sdxl_worker.generate.head_start import HeadStart

logger = logging.getLogger(__name__)

_USAGE = """SDXL with per-request LoRAs, as a RunPod serverless worker.

  python handler.py --test_input '{"input": {"prompt": "a lighthouse at dusk"}}'   one job; pictures go to output/
  python handler.py                                                                the job in test_input.json
  python handler.py --rp_serve_api                                                 RunPod's API on localhost:8000
  MODEL_ID=tiny python handler.py ...                                              without any download

On RunPod the same command takes jobs from the endpoint's queue. Environment variables (README has more about each):
"""
# Said here once more, and held to the SDK's parser by a test: asking the parser itself means importing the SDK, which
# takes over a second.
_SDK_OPTIONS = """
Options of the RunPod SDK:
  --test_input JSON          one job, instead of the one in test_input.json
  --rp_serve_api             serve RunPod's API over HTTP
  --rp_api_host HOST         where (default localhost)
  --rp_api_port PORT         where (default 8000)
  --rp_api_concurrency N     processes that serve it (default 1)
  --rp_log_level LEVEL       ERROR, WARN, INFO or DEBUG
  --rp_debugger              add the SDK's own measurements to the answer
"""
# Variables of RunPod that the SDK reads as whole numbers, some while it is imported, and what they are without one.
_NUMBERS = {"RUNPOD_REALTIME_PORT": 0, "RUNPOD_REALTIME_CONCURRENCY": 1, "RUNPOD_PING_INTERVAL": 10_000}
_LOG_LEVELS = ("NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR")
MAX_PORT = 65_535
# What is there where CUDA can be; the second under WSL.
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


def wants_help(arguments: Iterable[str]) -> bool:
    """True when the command line asks for help."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def help_text() -> str:
    """What --help prints: the ways to start, the environment variables, the SDK's own options."""
    variables = "\n".join(
        f"  {entry.metadata['name']:25} {entry.metadata['meaning']}"
        + (f" (default {entry.default})" if str(entry.default) and entry.repr else "")
        for entry in fields(Settings)
    )
    return f"{_USAGE}{variables}\n{_SDK_OPTIONS}"


def check_environment() -> None:
    """Raise ValueError, naming the variable, for what the SDK would end in a traceback over."""
    for name, default in _NUMBERS.items():
        _number(name, default)
    if not 0 <= _number("RUNPOD_REALTIME_PORT", 0) <= MAX_PORT:
        raise ValueError(f"RUNPOD_REALTIME_PORT should be between 0 and {MAX_PORT}")
    for name in ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        if (level := os.environ.get(name)) is not None:
            _check_level(name, level)


def _check_level(name: str, level: str) -> None:
    if level.upper() not in _LOG_LEVELS:
        raise ValueError(f"{name} should be one of {', '.join(_LOG_LEVELS)}, not {level!r}")


def _number(name: str, default: int) -> int:
    raw = os.environ.get(name)
    try:
        return default if raw is None else int(raw)
    except ValueError:
        raise ValueError(f"{name} should be a whole number, not {raw!r}") from None


def mode_of(arguments: argparse.Namespace) -> Mode:
    """How the SDK will get its jobs with these of its arguments, and this environment."""
    if arguments.rp_serve_api or _number("RUNPOD_REALTIME_PORT", 0):
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(job, dict) or job.get("input") is None:
        raise ValueError(f'{name} has no "input"; it should look like {{"input": {{"prompt": "a lighthouse"}}}}')


def head_start(settings: Settings) -> HeadStart:
    """Begin to read and hash the base model's weights, beside the imports that come next."""
    from sdxl_worker.generate.head_start import HeadStart

    return HeadStart(settings)


def prepare(settings: Settings) -> argparse.Namespace:
    """Send all logging to the SDK's logger, and read the command line as the SDK will. Imports the SDK."""
    import runpod.serverless as sdk

    from sdxl_worker.logs import configure_logging

    configure_logging(settings.secrets)
    arguments, _ = sdk.parser.parse_known_args()
    if arguments.rp_log_level:
        _check_level("--rp_log_level", arguments.rp_log_level)
    return arguments


def keep_compiled_code(settings: Settings) -> None:
    """Let Triton, and torch with COMPILE=1, keep what they compile in COMPILE_CACHE_DIR; their own variables go first.

    With COMPILE=0 that is the kernel which merges LoRAs on NVIDIA GPUs. To be called before anything is compiled. A
    folder that cannot be written is only logged: they have their own.
    """
    # Asking torch would mean importing it this early.
    if not settings.compile and not any(Path(device).exists() for device in _NVIDIA_DEVICES):
        return
    folder = settings.compile_cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        logger.warning("COMPILE_CACHE_DIR %s cannot be written (%s): compiled code is kept locally", folder, reason)
        return
    if settings.compile and os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, _torchs_own_folder()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _torchs_own_folder() -> str | None:
    """What torch sets its variable to while it is imported, by diffusers among others; None before that."""
    module = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    return module.default_cache_dir() if module else None


def start(config: dict[str, Any], checks: Iterable[functools.partial[None]]) -> None:
    """Hand over to the SDK, which runs the checks on RunPod before it takes a job, and reports them by their names."""
    import runpod.serverless as sdk

    from sdxl_worker.serving.sdk_loop import retry_dropped_connections

    for check in checks:
        sdk.register_fitness_check(functools.wraps(check.func)(check))
    retry_dropped_connections()
    sdk.start(config)
