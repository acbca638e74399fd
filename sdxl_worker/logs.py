"""Log records in the RunPod logger's format, with secrets masked and the running job's id."""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from sdxl_worker.masking import mask_urls

current_job: contextvars.ContextVar[str | None] = contextvars.ContextVar("current_job", default=None)

# `extra={PLAIN: True}`: the message is a line by itself, without level, job or logger in front and never cut.
PLAIN = "plain"
_LEVELS = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
# Their INFO and DEBUG lines hold whole URLs, with tokens and signatures in the queries.
_HTTP_LIBRARIES = (
    *("urllib3", "requests", "httpx", "httpx2", "httpcore", "httpcore2", "hpack", "h11", "aiohttp"),
    *("huggingface_hub", "botocore", "boto3", "s3transfer"),
)


def masked(text: str, secrets: Sequence[str] = ()) -> str:
    """`text` without the given secrets, and without the query and the user part of any URL; always valid Unicode."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return mask_urls(text)


def quiet_http_libraries() -> None:
    """Keep HTTP libraries to warnings, whatever level the root logger has. Called wherever logging is configured."""
    for name in _HTTP_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


def take_over_hub_log() -> None:
    """The Hub client writes lines itself, with signed addresses in them; leave its warnings to the handler that masks.

    Called where it is used, since importing it installs its own handler and HF_HUB_VERBOSITY as its level.
    """
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.get_logger().handlers.clear()
    hub_logging.set_verbosity_warning()


class RunPodHandler(logging.Handler):
    """Hands records to the SDK's logger, which writes what RunPod's console reads (text locally, JSON on RunPod)."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        from runpod.serverless.modules.rp_logger import RunPodLogger

        self._secrets = tuple(secrets)
        self._target = RunPodLogger()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        level = _LEVELS.get(record.levelno, "ERROR" if record.levelno > logging.ERROR else "INFO")
        plain = getattr(record, PLAIN, False)
        text = masked(record.getMessage() if plain else self.format(record), self._secrets)
        # A progress bar on the same terminal steps aside for the line.
        with tqdm.external_write_mode():
            if plain:
                self._write(text, level)
            else:
                self._target.log(text, level, current_job.get())

    def _write(self, line: str, level: str) -> None:
        """What the SDK's logger would write, but for its prefix and its limit of 4,096 characters."""
        from runpod.serverless.modules.rp_logger import LOG_LEVELS

        if self._target.level == "NOTSET" or LOG_LEVELS.index(self._target.level) > LOG_LEVELS.index(level):
            return
        if os.environ.get("RUNPOD_ENDPOINT_ID"):
            line = json.dumps({"requestId": current_job.get(), "message": line, "level": level})
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def configure_logging(secrets: Sequence[str]) -> None:
    """Send all log records of this process to the RunPod logger, and keep libraries to warnings.

    The SDK's default of DEBUG logs whole requests and answers; without RUNPOD_LOG_LEVEL it becomes INFO here.
    """
    from runpod.serverless.modules.rp_logger import RunPodLogger

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Unbuffered (python -u), the SDK's print() writes a line and its end apart, and another thread's line between.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if not {"RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"} & os.environ.keys():
        RunPodLogger.level = "INFO"
    # diffusers warns of a prompt that is cut off with the whole prompt; the answer's `warnings` say it in a sentence.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, handlers=[RunPodHandler(secrets)], force=True)
    for name in ("handler", "sdxl_worker", "download_weights"):
        logging.getLogger(name).setLevel(logging.INFO)
    quiet_http_libraries()
    logging.captureWarnings(True)
