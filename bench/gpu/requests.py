"""Whole warm requests through the worker, from validation to data URI, with LoRAs and without, in turns."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.instruments import spread
from bench.lora_files import SCALE, write_loras
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

COUNTS = (1, 4)


def fields(size: int, steps: int, **more: Any) -> dict[str, Any]:
    """A request with a fixed seed."""
    return {
        "prompt": "a lighthouse at dusk",
        "width": size,
        "height": size,
        "num_inference_steps": steps,
        "seed": 1,
        **more,
    }


@contextlib.contextmanager
def worker_with_loras(pipeline: Any, count: int, **settings: Any) -> Iterator[tuple[Worker, list[dict[str, Any]]]]:
    """A worker around `pipeline`, and the entries of a request's `loras` for as many files of rank 32."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_loras(pipeline, Path(folder), count)
        worker = Worker(Settings(model_id="tiny", lora_cache_dir=Path(folder), **settings))
        worker.resident.use(pipeline)
        yield worker, [{"path": path.name, "scale": SCALE} for path in paths]


def answered(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, which has to have pictures."""
    answer = worker.run({"id": "bench", "input": request})
    assert "images" in answer, answer
    return answer


def whole(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of requests with no LoRA, one and four, and each round's ratio to its plain request."""
    with worker_with_loras(pipeline, max(COUNTS)) as (worker, loras):
        requests = {
            count: fields(options.size, options.steps, **({"loras": loras[:count]} if count else {}))
            for count in (0, *COUNTS)
        }
        pictures = {count: answered(worker, request)["images"][0] for count, request in requests.items()}
        seconds: dict[int, list[float]] = {count: [] for count in requests}
        changed: set[int] = set()
        for _ in range(options.repeats):
            for count, request in requests.items():
                started = time.perf_counter()
                answer = answered(worker, request)
                seconds[count].append(time.perf_counter() - started)
                if answer["images"][0] != pictures[count]:
                    changed.add(count)
    ratios = {
        str(count): spread([own / plain for own, plain in zip(seconds[count], seconds[0], strict=True)])
        for count in COUNTS
    }
    return {
        "request_s": {str(count): spread(values) for count, values in seconds.items()},
        "ratio": ratios,
        "another_picture_than_at_first": sorted(changed),
        "loras_change_the_picture": all(pictures[count] != pictures[0] for count in COUNTS),
    }
