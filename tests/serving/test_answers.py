"""An answer is always valid JSON and within RunPod's limits."""

import json
import math

import pytest

from sdxl_worker.errors import ResponseTooLarge
from sdxl_worker.serving.answers import answer_limit, check_size, sendable


def test_what_the_sdk_could_not_send_is_replaced():
    answer = sendable(
        {"text": "a\ud800b", "nan": math.nan, "inf": [math.inf], "odd": {1: (1, 2.5, None, True)}, "x": {3}}
    )
    sent = json.dumps(answer, ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert json.loads(sent) == {
        "text": "a?b",
        "nan": "nan",
        "inf": ["inf"],
        "odd": {"1": [1, 2.5, None, True]},
        "x": "{3}",
    }


def test_plain_answers_pass_unchanged():
    answer = {"images": ["data:"], "seed": 2**64 - 1, "loras": [{"scale": 0.8}]}
    assert sendable(answer) == answer


@pytest.mark.parametrize(("job_id", "megabytes"), [("sync-79164ff4-u1", 20), ("c80ffee4-u1", 10), ("local", 10)])
def test_limits_are_a_little_below_the_platform_s(job_id, megabytes):
    assert megabytes * 1e6 * 0.99 < answer_limit(job_id) < megabytes * 1e6


def test_row_53_says_what_to_do():
    check_size({"images": ["x" * 100]}, 120)
    check_size({"images": ["x" * 100]}, None)
    with pytest.raises(ResponseTooLarge, match=r"output_format jpeg, webp or auto.*BUCKET_"):
        check_size({"images": ["x" * 100]}, 100)
