"""How busy the device is over a mixed run: a real worker on the SDK's loop with WORKER_CONCURRENCY=2, on a local queue.

nvidia-smi says a few times a second in what share of the time before a kernel ran.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.gpu.mixed import DEVICE, MODEL, jobs
from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess, worker_environment

SAMPLE_MS = 250
SCRIPT = "import sys; from bench.gpu.mixed import main; sys.exit(main())"
# Stages of a job while which it has the device to itself.
_ON_THE_DEVICE = ("applying_loras", "denoising", "restoring")


def measure(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Percent busy from the first job's start to the last answer, and the jobs' own times."""
    with tempfile.TemporaryDirectory() as folder, QueueServer() as queue:
        cache = Path(folder) / "cache"
        cache.mkdir()
        more = {"WORKER_CONCURRENCY": "2", "COMPILE_CACHE_DIR": f"{folder}/compiled"}
        more |= {MODEL: options.model, DEVICE: options.device}
        environment = {**worker_environment(cache), **queue.environment("mixed"), **more}
        if options.device == "cuda":
            # One thread is for small machines on which several workers draw on the CPU.
            environment = {name: value for name, value in environment.items() if not name.endswith("_NUM_THREADS")}
        with WorkerProcess(Path(folder) / "worker.log", environment, script=SCRIPT) as worker:
            # Kernels are loaded and LoRAs are read before it counts.
            for fields in jobs(4, options.shrink):
                _drawn(queue, worker, queue.submit(fields))
            before = len(worker.lines())
            with samples() as busy:
                started = time.monotonic()
                ids = [queue.submit(fields) for fields in jobs(options.jobs, options.shrink)]
                for job_id in ids:
                    _drawn(queue, worker, job_id)
                seconds = time.monotonic() - started
            worker.wait_for(f'"{ids[-1]}"')
            lines = worker.lines()[before:]
    held = sum(line["ms"].get(stage, 0.0) for line in lines for stage in _ON_THE_DEVICE) / 1000
    counted = [(round(at - started, 2), percent) for at, percent in busy if started <= at <= started + seconds]
    percents = [percent for _, percent in counted]
    result = {
        "jobs": options.jobs,
        "seconds": seconds,
        "jobs_per_minute": 60 * options.jobs / seconds,
        "device_held_percent": 100 * held / seconds,
        "stages_ms": _stages(lines),
        "samples": {"at_s": [at for at, _ in counted], "percent": percents},
    }
    return {**result, "busy_percent": statistics.mean(percents)} if percents else result


def _drawn(queue: QueueServer, worker: WorkerProcess, job_id: str) -> None:
    queue.wait(lambda: queue.of("done", job_id) or worker.process.poll() is not None, what=f"an answer to {job_id}")
    answers = queue.of("done", job_id)
    assert answers, f"the worker ended: {worker.text[-2000:]}"
    assert "images" in (answers[0].body.get("output") or {}), answers[0].body


def _stages(lines: list[dict[str, Any]]) -> dict[str, float]:
    names = {name for line in lines for name in line["ms"]}
    return {name: statistics.median(line["ms"].get(name, 0.0) for line in lines) for name in sorted(names)}


def readings(lines: Iterable[str]) -> Iterator[tuple[float, int]]:
    """The moment (time.monotonic) and the percent of each line that has one."""
    for line in lines:
        if line.strip().isdecimal():
            yield time.monotonic(), int(line)


@contextlib.contextmanager
def samples() -> Iterator[list[tuple[float, int]]]:
    """The readings of nvidia-smi, as they come; none without it."""
    found: list[tuple[float, int]] = []
    ended = threading.Event()
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0"]

    def read() -> None:
        # One call each: in a loop of its own nvidia-smi may hold lines back as long as nobody watches.
        while not ended.wait(SAMPLE_MS / 1000):
            told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            found.extend(readings(told.splitlines()))

    reader = threading.Thread(target=read)
    if shutil.which("nvidia-smi") is not None:
        reader.start()
    try:
        yield found
    finally:
        ended.set()
        if reader.ident is not None:
            reader.join()
