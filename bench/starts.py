"""The three ways to a first picture that `bench.cold_start` compares: a bare script, a local run, a job on a queue.

Each is a process of its own, from `python` to a saved PNG or a posted answer, and tells the seconds of its stages.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess, worker_environment

# What a user without this worker would write. The line that it prints holds times since the Unix epoch.
BARE = """
import json, sys, time
marks = {"python": time.time()}
import torch
from diffusers import StableDiffusionXLPipeline
marks["imports"] = time.time()
folder, device, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
dtype = torch.float16 if device == "cuda" else torch.float32
pipeline = StableDiffusionXLPipeline.from_pretrained(
    folder, torch_dtype=dtype, use_safetensors=True, add_watermarker=False
).to(device)
pipeline.set_progress_bar_config(disable=True)
marks["model"] = time.time()
(picture,) = pipeline(
    job["prompt"],
    width=job["width"],
    height=job["height"],
    num_inference_steps=job["num_inference_steps"],
    guidance_scale=job["guidance_scale"],
    generator=torch.Generator(device).manual_seed(job["seed"]),
).images
marks["picture"] = time.time()
picture.save("picture.png")
marks["encoding"] = time.time()
print(json.dumps(marks))
"""
READY = re.compile(r"ready after ([0-9.]+) s: imports ([0-9.]+), base model ([0-9.]+), LoRAs ([0-9.]+)")
_FITNESS = re.compile(r"All fitness checks passed\. \(([0-9.]+)ms\)")
# -X importtime: microseconds of the module itself, of it and what it imports, indented by depth.
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")
_SHOWN_PACKAGES = 12
_PATIENCE_S = 150.0
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Setting:
    """One comparison: where the weights lie, what is asked for, and how often."""

    folder: Path
    device: str
    repeats: int
    size: int
    steps: int
    cold_cache: bool = False

    @property
    def job(self) -> dict[str, Any]:
        """The request's fields; the sampler is the one that the folder has."""
        return {
            "prompt": "a lighthouse at dusk",
            "width": self.size,
            "height": self.size,
            "num_inference_steps": self.steps,
            "guidance_scale": 7.5,
            "scheduler": "K_EULER",
            "seed": 1,
        }

    def environment(self, work: Path) -> dict[str, str]:
        """For every contestant alike: torch's own number of threads, and bytecode is kept, as the image has it."""
        given = worker_environment(work / "loras", MODEL_ID=str(self.folder))
        for name in (*_ONE_THREAD, "PYTHONDONTWRITEBYTECODE"):
            given.pop(name, None)
        threads = {name: os.environ[name] for name in _ONE_THREAD if name in os.environ}
        return {**given, **threads}


def start_bare(setting: Setting, work: Path, *, importtime: bool = False) -> dict[str, float]:
    """Seconds of the bare script's stages, in total, and of processor time."""
    arguments = (str(setting.folder), setting.device, json.dumps(setting.job))
    started, spent = time.time(), _processor_seconds()
    with _process(work, setting, *arguments, script=BARE, importtime=importtime) as process:
        _end_well(process)
        (line,) = [line for line in process.text.splitlines() if line.startswith('{"python"')]
    marks = json.loads(line)
    times = [started, *marks.values()]
    stages = {name: after - before for name, before, after in zip(marks, times, times[1:], strict=False)}
    return {**stages, "total": times[-1] - started, "processor": _processor_seconds() - spent}


def start_local(setting: Setting, work: Path, *, importtime: bool = False) -> dict[str, float]:
    """Seconds of a local run's stages, until its picture was saved, and of processor time."""
    picture = work / "output" / "local_test_1.png"
    picture.unlink(missing_ok=True)
    started, spent = time.time(), _processor_seconds()
    arguments = ("--test_input", json.dumps({"input": setting.job}))
    with _process(work, setting, *arguments, importtime=importtime) as process:
        _end_well(process)
        if not picture.is_file():
            raise RuntimeError(process.text[-2000:])
        stages = stages_of(process, picture.stat().st_mtime - started)
    return {**stages, "processor": _processor_seconds() - spent}


def start_queue(setting: Setting, work: Path) -> dict[str, float]:
    """Seconds of a worker's stages until it has answered a job that waits in a queue, and of processor time."""
    with QueueServer() as queue:
        job_id = queue.submit(setting.job)
        started, spent = time.monotonic(), _processor_seconds()
        with _process(work, setting, environment=queue.environment("bench")) as process:
            ended = process.process
            queue.wait(lambda: queue.of("done", job_id) or ended.poll() is not None, _PATIENCE_S, "an answer")
            done = next(iter(queue.of("done", job_id)), None)
            if done is None or "output" not in done.body:
                raise RuntimeError(process.text[-2000:])
            process.wait_for('{"job"')
            stages = stages_of(process, done.at - started)
        return {**stages, "processor": _processor_seconds() - spent}


def _processor_seconds() -> float:
    """Of the processes that this one has waited for, with what they have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _process(
    work: Path,
    setting: Setting,
    *arguments: str,
    script: str = "",
    environment: dict[str, str] | None = None,
    importtime: bool = False,
) -> WorkerProcess:
    more = {"PYTHONPROFILEIMPORTTIME": "1"} if importtime else {}
    given = {**setting.environment(work), **(environment or {}), **more}
    return WorkerProcess(work / "log", given, *arguments, script=script)


def _end_well(process: WorkerProcess) -> None:
    try:
        status = process.exit_status(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        status = -1
    if status != 0:
        raise RuntimeError(process.text[-2000:])


def stages_of(process: WorkerProcess, total: float) -> dict[str, float]:
    """From the worker's own lines: one when it is ready, one of the SDK's about the checks, one per job."""
    stages = {}
    if found := READY.search(process.text):
        _, stages["imports"], stages["model"], stages["loras"] = map(float, found.groups())
    if fitness := _FITNESS.search(process.text):
        stages["fitness"] = float(fitness[1]) / 1000
    job = {name: spent / 1000 for name, spent in process.lines()[0]["ms"].items() if name != "total"}
    stages["picture"] = job.pop("denoising")
    stages["encoding"] = job.pop("encoding")
    stages["job_beside"] = sum(job.values())
    return {**stages, "rest": total - sum(stages.values()), "total": total}


def imports(start: Callable[..., Any], setting: Setting, work: Path) -> dict[str, float]:
    """How many modules, and seconds that those of each top-level package take by themselves, the slowest first."""
    start(setting, work, importtime=True)
    spent: dict[str, float] = defaultdict(float)
    found = _IMPORT.findall((work / "log").read_text(errors="replace"))
    for own, package in found:
        spent[package] += int(own) / 1e6
    first = sorted(spent, key=spent.__getitem__, reverse=True)[:_SHOWN_PACKAGES]
    shown = {package: round(spent[package], 3) for package in first}
    return {"modules": len(found), "all": round(sum(spent.values()), 3), **shown}


def drop_pages(folder: Path) -> None:
    """Let the operating system forget the files' pages, which others that map them would keep."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
