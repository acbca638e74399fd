"""The last step before RunPod: an answer that is always valid JSON and within the platform's limits."""

from __future__ import annotations

import json
import math
from typing import Any

from sdxl_worker.errors import ResponseTooLarge
from sdxl_worker.text import as_unicode

# https://docs.runpod.io/serverless/endpoints/operation-reference: 10 MB for /run, 20 MB for /runsync. Some of it is
# kept for what RunPod adds around the answer.
RUN_LIMIT = 10_000_000 - 64_000
RUNSYNC_LIMIT = 20_000_000 - 64_000


def answer_limit(job_id: str) -> int:
    """How many bytes the answer of a job may have: RunPod's ids of /runsync jobs start with `sync-`."""
    return RUNSYNC_LIMIT if job_id.startswith("sync-") else RUN_LIMIT


def sendable(value: Any) -> Any:
    """`value` with everything replaced that the SDK could not send.

    A lone surrogate or a type that JSON lacks means no answer at all, and NaN one that is not JSON.
    """
    if isinstance(value, str):
        return as_unicode(value)
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(sendable(str(key))): sendable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [sendable(entry) for entry in value]
    return sendable(str(value))


def json_size(answer: dict[str, Any]) -> int:
    """How many bytes the answer has as the SDK sends it."""
    return len(json.dumps(sendable(answer), ensure_ascii=False).encode())


def check_size(answer: dict[str, Any], limit: int | None) -> None:
    """Raise ResponseTooLarge, saying what to do, when the answer's JSON has more than `limit` bytes."""
    if limit is None:
        return
    size = json_size(answer)
    if size > limit:
        raise ResponseTooLarge(
            f"the answer has {size / 1e6:.1f} MB and RunPod takes {limit / 1e6:.1f} MB: ask for output_format jpeg, "
            "webp or auto, for fewer or smaller pictures, or set the BUCKET_* variables"
        )
