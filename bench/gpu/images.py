"""Images per second of the whole worker with COMPILE=1, against worker-sdxl's way from prompt to base64.

`bench.rendering` measures drawing alone, and says what worker-sdxl's set-up is.
"""

from __future__ import annotations

import argparse
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.compiled_state import Compiled
from bench.gpu.requests import answered, fields, worker_with_loras
from bench.instruments import Clock, spread
from bench.worker_sdxl import GUIDANCE, SCHEDULER, bare, request_of

AT_A_TIME = ("one at a time", "two at a time")


def measure(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an image in both ways; each round's ratio is of neighbours."""
    request = request_of(options)

    def theirs() -> None:
        buffer = io.BytesIO()
        bare(pipeline, request).save(buffer, "PNG")
        base64.b64encode(buffer.getvalue())

    clock, compiled = Clock(pipeline.device.type), Compiled(pipeline, options.backend)
    job = fields(options.size, options.steps, scheduler=SCHEDULER, guidance_scale=GUIDANCE)
    seconds: dict[str, list[float]] = {name: [] for name in ("worker-sdxl", *AT_A_TIME)}
    with worker_with_loras(pipeline, 0) as (worker, _):

        def two_at_a_time() -> None:
            with ThreadPoolExecutor(2) as threads:
                for answer in [threads.submit(answered, worker, job) for _ in range(4)]:
                    answer.result()

        theirs()
        with compiled.entered():
            two_at_a_time()
        for _ in range(options.repeats):
            seconds["worker-sdxl"].append(clock.time(theirs))
            with compiled.entered():
                seconds["one at a time"].append(clock.time(lambda: answered(worker, job)))
                seconds["two at a time"].append(clock.time(two_at_a_time) / 4)
    base = spread(seconds["worker-sdxl"])["median"]
    return {
        "seconds_an_image": {name: spread(values) for name, values in seconds.items()},
        "ratio": {name: base / spread(seconds[name])["median"] for name in AT_A_TIME},
    }
