"""Log records in the RunPod logger's format, with secrets masked and the running job's id."""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Sequence

from tqdm import tqdm

from sdxl_worker.masking import mask_urls

current_job: contextvars.ContextVar[str | None] = contextvars.ContextVar("current_job", default=None)

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
        # A progress bar on the same terminal steps aside for the line.
        with tqdm.external_write_mode():
            self._target.log(masked(self.format(record), self._secrets), level, current_job.get())


def configure_logging(secrets: Sequence[str]) -> None:
    """Send all log records of this process to the RunPod logger, and keep libraries to warnings.

    The SDK's default of DEBUG logs whole requests and answers; without RUNPOD_LOG_LEVEL it becomes INFO here.
    """
    from runpod.serverless.modules.rp_logger import RunPodLogger

    if not {"RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"} & os.environ.keys():
        RunPodLogger.level = "INFO"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, handlers=[RunPodHandler(secrets)], force=True)
    for name in ("handler", "sdxl_worker", "download_weights"):
        logging.getLogger(name).setLevel(logging.INFO)
    quiet_http_libraries()
    logging.captureWarnings(True)
