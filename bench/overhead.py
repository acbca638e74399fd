"""What the worker adds to rendering: a request through the handler against a bare diffusers call, in one run.

On the narrow SDXL (real topology, about 1/8 of the width) the handler's whole answer (validation, render, PNG with its
text, data URI) is measured against `pipeline(...)` that returns pictures, alternating, and the time of each stage is
printed. Then PNG levels on a picture with the spectrum of a photograph, and jobs per minute of a real worker on a local
queue with a slow file server, with WORKER_CONCURRENCY 1 and 2. Prints tables of ratios and writes everything to
bench/results/.

    python -m bench.overhead [--repeats 15] [--side 256] [--steps 12] [--jobs 12]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import handler
from bench.encodings import png_levels
from bench.instruments import Clock, spread
from bench.models import random_pipeline
from bench.report import machine, table, write_result
from schemas import validate_request
from sdxl_worker import topology
from sdxl_worker.generate.images import PNG_LEVEL
from sdxl_worker.generate.samplers import make_scheduler
from sdxl_worker.request import GenerationRequest
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess, worker_environment
from tests.support.http_server import FileServer, slowly

DOWNLOAD_PIECES, DOWNLOAD_PAUSE_S = 20, 0.1


class JobLines(logging.Handler):
    """Collects the stage times that the handler logs for each job."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.stages: dict[str, list[float]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        for stage, milliseconds in json.loads(record.getMessage())["ms"].items():
            self.stages[stage].append(milliseconds)

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, each job's line comes here and nowhere else."""
        jobs_logger = logging.getLogger("sdxl_worker.job_run")
        before = jobs_logger.level, jobs_logger.propagate
        jobs_logger.setLevel(logging.INFO)
        jobs_logger.propagate = False
        jobs_logger.addHandler(self)
        try:
            yield
        finally:
            jobs_logger.removeHandler(self)
            jobs_logger.setLevel(before[0])
            jobs_logger.propagate = before[1]


def request_overhead(repeats: int, side: int, steps: int) -> dict[str, Any]:
    """`run_on` on the narrow model."""
    return run_on(random_pipeline("cpu", "narrow"), argparse.Namespace(repeats=repeats, size=side, steps=steps))


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole requests and of bare calls, alternating; `ratio` is the median of the pairs' ratios."""
    worker = Worker(Settings(model_id="tiny"))
    worker.resident.use(pipeline)
    handler.process.worker = worker  # the pipeline has no MODEL_ID
    sides = {"width": options.size, "height": options.size}
    fields = {"prompt": "a lighthouse", **sides, "num_inference_steps": options.steps, "seed": 1}
    bare = functools.partial(_bare, pipeline, validate_request(fields), pipeline.scheduler)
    lines, clock = JobLines(), Clock(pipeline.device.type)

    def through_the_handler() -> None:
        answer = handler.generate_image({"id": "bench", "input": fields})
        assert "images" in answer, answer

    bare()
    through_the_handler()
    pairs = []
    with lines.collected():
        for number in range(options.repeats):
            first, second = (bare, through_the_handler) if number % 2 else (through_the_handler, bare)
            times = {first: clock.time(first), second: clock.time(second)}
            pairs.append((times[bare], times[through_the_handler]))
    ratios = [through / alone for alone, through in pairs]
    stages = {stage: statistics.median(values) for stage, values in lines.stages.items()}
    return {
        "side": options.size,
        "steps": options.steps,
        "repeats": options.repeats,
        "bare_s": statistics.median(pair[0] for pair in pairs),
        "handler_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "stages_ms": stages,
        "share_beside_rendering": 1 - stages["denoising"] / stages["total"],
    }


def _bare(pipeline: Any, request: GenerationRequest, own_scheduler: Any) -> None:
    """The request as a script on diffusers would draw it."""
    pipeline.scheduler = make_scheduler(request.scheduler, own_scheduler.config)
    pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator(pipeline.device).manual_seed(1),
    )
    pipeline.scheduler = own_scheduler


def pipelining(jobs: int, concurrency: int, folder: Path) -> float:
    """Jobs per minute of one worker when every job names a LoRA that has to be downloaded from a slow server."""
    content = topology.write_example_lora(folder / "source").read_bytes()
    fields = {"prompt": "a", "width": 256, "height": 256, "num_inference_steps": 20, "seed": 1}
    cache = folder / f"cache-{concurrency}"
    with QueueServer() as queue, FileServer() as files:
        environment = worker_environment(cache, WORKER_CONCURRENCY=str(concurrency))
        with WorkerProcess(folder / f"log-{concurrency}", {**environment, **queue.environment("bench")}):
            queue.answer(queue.submit(fields), 300)
            start = time.perf_counter()
            ids = []
            for number in range(jobs):
                url = files.add(f"/{number}.safetensors", slowly(content, DOWNLOAD_PIECES, DOWNLOAD_PAUSE_S))
                ids.append(queue.submit({**fields, "loras": [url]}))
            for job_id in ids:
                assert "output" in queue.answer(job_id, 300)
            return 60 * jobs / (time.perf_counter() - start)


def main() -> None:
    """Measure, print tables, write bench/results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args()
    overhead = request_overhead(options.repeats, options.side, options.steps)
    levels = png_levels()
    with tempfile.TemporaryDirectory() as folder:
        per_minute = {str(count): pipelining(options.jobs, count, Path(folder)) for count in (1, 2)}
    results = {
        **machine(),
        "request": overhead,
        "encodings_1024": levels,
        "png_level_chosen": PNG_LEVEL,
        "pipelining": {
            "download_s": DOWNLOAD_PIECES * DOWNLOAD_PAUSE_S,
            "jobs": options.jobs,
            "jobs_per_minute": per_minute,
            "ratio": per_minute["2"] / per_minute["1"],
        },
    }
    path = write_result("overhead", results)
    sys.stdout.write(f"{_report(results)}\n\nwritten to {path}\n")


def _report(results: dict[str, Any]) -> str:
    request, levels, queue = results["request"], results["encodings_1024"], results["pipelining"]
    stages = [[stage, f"{spent:.1f} ms"] for stage, spent in request["stages_ms"].items()]
    default = levels["png level 6"]
    encodings = [
        [name, f"{one['ms']:.0f} ms", f"{one['ms'] / default['ms']:.2f}", f"{one['bytes'] / default['bytes']:.2f}"]
        for name, one in levels.items()
    ]
    ratios = [
        ["whole request / bare diffusers call", f"{request['ratio']:.4f}"],
        ["all but rendering / whole request", f"{request['share_beside_rendering']:.4f}"],
        ["jobs per minute, WORKER_CONCURRENCY 2 / 1", f"{queue['ratio']:.2f}"],
    ]
    return "\n\n".join(
        (
            table(["ratio", "value"], ratios),
            table(["stage of the request", "median"], stages),
            table(["encoding of 1024 x 1024", "median", "time / level 6", "bytes / level 6"], encodings),
        )
    )


if __name__ == "__main__":
    main()
