"""From the start of a process to its first picture: this worker against a bare script on diffusers, in one run.

Processes take turns, each from `python` to a saved PNG or a posted answer, with the same folder of weights and request:

  bare   a script that imports torch and diffusers, loads the folder with from_pretrained, renders, saves
  local  python handler.py --test_input ...
  queue  python handler.py as on RunPod, fitness checks included, with one job waiting in a queue on this machine

The weights are random: on the CPU an SDXL of about 1/8 width (float32), on a GPU the full size (float16), saved to a
temporary folder unless --folder names one. The SDK's own start-up checks, which want its network, are left out. Then
`-X importtime` of a bare and a local run says which packages take how long. Prints tables of ratios and writes all to
bench/results/cold_start_DEVICE.json.

    python -m bench.cold_start [--repeats 7] [--size 256] [--steps 8] [--folder FOLDER] [--cold-cache]

--cold-cache lets go of the weights' pages before each start, so that they come from the disk each time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import machine, table, write_result
from sdxl_worker import topology
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
CONTESTANTS = ("bare", "local", "queue")
# From the start of the process; `rest` is what no line of the log tells: Python itself, and the SDK's way to the job.
STAGES = ("python", "imports", "model", "loras", "fitness", "job_beside", "picture", "encoding", "rest", "total")
_READY = re.compile(r"ready after ([0-9.]+) s: imports ([0-9.]+), base model ([0-9.]+), LoRAs ([0-9.]+)")
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


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the three ways to start, from `options.folder`, or from a temporary folder of `pipeline`'s weights.

    Without either, from random weights of the size `options.model`. Every option may be left out.
    """
    device = pipeline.device.type if pipeline is not None else _device(options)
    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory(prefix="cold_start_") as name:
        work = Path(name)
        folder = getattr(options, "folder", None) or _saved(pipeline, getattr(options, "model", None), device, work)
        setting = Setting(
            Path(folder).absolute(),
            device,
            getattr(options, "repeats", None) or (3 if on_gpu else 7),
            getattr(options, "size", None) or (1024 if on_gpu else 256),
            getattr(options, "steps", None) or (28 if on_gpu else 8),
            bool(getattr(options, "cold_cache", False)),
        )
        return measure(setting, work)


def _device(options: argparse.Namespace) -> str:
    if chosen := getattr(options, "device", None):
        return str(chosen)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _saved(pipeline: Any, model: str | None, device: str, work: Path) -> Path:
    """The folder of the pipeline's weights, on the disk; one that is made here is let go of again."""
    import torch

    on_gpu = device == "cuda"
    if pipeline is None:
        size = {"full": topology.FULL, "narrow": topology.NARROW, "tiny": topology.TINY}[
            model or ("full" if on_gpu else "narrow")
        ]
        pipeline = topology.build_sdxl(size, dtype=torch.float16 if on_gpu else torch.float32, device=device)
    pipeline.save_pretrained(work / "model")
    os.sync()
    del pipeline
    if on_gpu:
        torch.cuda.empty_cache()
    return work / "model"


def measure(setting: Setting, work: Path) -> dict[str, Any]:
    """Seconds of each contestant, ratios to `bare` of the same turn, stages, and what the imports take."""
    contestants: dict[str, Callable[[Setting, Path], dict[str, float]]] = {
        "bare": start_bare,
        "local": start_local,
        "queue": start_queue,
    }
    turns: list[dict[str, dict[str, float]]] = []
    failed: dict[str, str] = {}
    # The first turn writes the bytecode and warms the libraries' pages.
    for number in range(setting.repeats + 1):
        turn = {}
        for name in CONTESTANTS if number % 2 else CONTESTANTS[::-1]:
            if name in failed:
                continue
            if setting.cold_cache:
                _drop_pages(setting.folder)
            try:
                turn[name] = contestants[name](setting, work)
            except RuntimeError as error:
                # One that does not get to a picture must not take the others' figures along.
                failed[name] = str(error)
        turns.append(turn)
    if failed.keys() >= {"local", "queue"} or "bare" in failed:
        raise RuntimeError(f"nothing to compare: {failed}")
    counted = turns[1:]
    return {
        "weights_gb": round(sum(path.stat().st_size for path in setting.folder.rglob("*")) / 1e9, 3),
        "device": setting.device,
        "page_cache": "the weights' pages dropped before each start" if setting.cold_cache else "warm",
        "repeats": setting.repeats,
        "request": setting.job,
        "failed": failed,
        **_compared("seconds", "ratio_to_bare", "total", counted),
        **_compared("processor_s", "processor_ratio_to_bare", "processor", counted),
        "stages_s": {name: _medians([turn[name] for turn in counted]) for name in _through(counted)},
        # The device has no part in it, and its machine's time is dear.
        "imports_s": {
            name: _imports(start, setting, work)
            for name, start in (("bare", start_bare), ("local", start_local))
            if name not in failed and setting.device == "cpu"
        },
    }


def _through(turns: list[dict[str, dict[str, float]]]) -> list[str]:
    """The contestants that came through every turn."""
    return [name for name in CONTESTANTS if all(name in turn for turn in turns)]


def _compared(values: str, ratios: str, key: str, turns: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    names = _through(turns)
    return {
        values: {name: _spread([turn[name][key] for turn in turns]) for name in names},
        ratios: {name: _spread([turn[name][key] / turn["bare"][key] for turn in turns]) for name in names[1:]},
    }


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
        stages = _stages(process, picture.stat().st_mtime - started)
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
            stages = _stages(process, done.at - started)
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
    if process.exit_status(_PATIENCE_S) != 0:
        raise RuntimeError(process.text[-2000:])


def _stages(process: WorkerProcess, total: float) -> dict[str, float]:
    """From the worker's own lines: one when it is ready, one of the SDK's about the checks, one per job."""
    stages = {}
    if found := _READY.search(process.text):
        _, stages["imports"], stages["model"], stages["loras"] = map(float, found.groups())
    if fitness := _FITNESS.search(process.text):
        stages["fitness"] = float(fitness[1]) / 1000
    job = {name: spent / 1000 for name, spent in process.lines()[0]["ms"].items() if name != "total"}
    stages["picture"] = job.pop("denoising")
    stages["encoding"] = job.pop("encoding")
    stages["job_beside"] = sum(job.values())
    return {**stages, "rest": total - sum(stages.values()), "total": total}


def _imports(start: Callable[..., Any], setting: Setting, work: Path) -> dict[str, float]:
    """How many modules, and seconds that those of each top-level package take by themselves, the slowest first."""
    start(setting, work, importtime=True)
    spent: dict[str, float] = defaultdict(float)
    found = _IMPORT.findall((work / "log").read_text(errors="replace"))
    for own, package in found:
        spent[package] += int(own) / 1e6
    first = sorted(spent, key=spent.__getitem__, reverse=True)[:_SHOWN_PACKAGES]
    shown = {package: round(spent[package], 3) for package in first}
    return {"modules": len(found), "all": round(sum(spent.values()), 3), **shown}


def _drop_pages(folder: Path) -> None:
    """Let the operating system forget the files' pages, which others that map them would keep."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(turn.get(name, 0.0) for turn in turns), 3) for name in turns[0]}


def options_from(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options; an empty list gives the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU where there is one)")
    parser.add_argument("--repeats", type=int, help="turns that count; one more comes before them (default 7, GPU 3)")
    parser.add_argument("--size", type=int, help="of the picture (default 256, GPU 1024)")
    parser.add_argument("--steps", type=int, help="(default 8, GPU 28)")
    parser.add_argument("--model", choices=("tiny", "narrow", "full"), help="(default narrow, GPU full)")
    parser.add_argument("--folder", type=Path, help="of an SDXL in diffusers' layout, instead of random weights")
    parser.add_argument("--cold-cache", action="store_true", help="read the weights from the disk each time")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print tables, write bench/results/cold_start_DEVICE.json, or cold_start_DEVICE_cold.json."""
    options = options_from()
    results = run_on(None, options)
    name = f"cold_start_{results['device']}{'_cold' if options.cold_cache else ''}"
    path = write_result(name, {**machine(results["device"]), "cold_start": results})
    sys.stdout.write(f"{report(results)}\n\nwritten to {path}\n")


def report(results: dict[str, Any]) -> str:
    """The tables that a person reads."""
    rows = []
    for what, ratios in (("seconds", "ratio_to_bare"), ("processor_s", "processor_ratio_to_bare")):
        label = "processor seconds" if what == "processor_s" else "seconds"
        rows += [
            [f"{label}, {name} / bare", *(f"{value:.3f}" for value in spread.values())]
            for name, spread in results[ratios].items()
        ]
        rows += [
            [f"{label}, {name}", *(f"{value:.2f} s" for value in spread.values())]
            for name, spread in results[what].items()
        ]
    contestants = list(results["stages_s"])
    stages = [
        [stage, *(f"{results['stages_s'][name].get(stage, 0.0):.2f} s" for name in contestants)] for stage in STAGES
    ]
    imports = results["imports_s"]
    packages = [
        [name, *(f"{imports[who].get(name, 0.0):.2f} s" for who in imports)]
        for name in dict.fromkeys(name for one in imports.values() for name in one)
        if name != "modules"
    ]
    packages.insert(0, ["modules", *(f"{one['modules']}" for one in imports.values())])
    return "\n\n".join(
        (
            f"{results['weights_gb']} GB of weights on {results['device']}, page cache: {results['page_cache']}",
            *(f"{name} failed: {reason}" for name, reason in results["failed"].items()),
            table(["from start to first picture", "median", "min", "max"], rows),
            table(["stage (median)", *contestants], stages),
            *([table(["modules by themselves, -X importtime", *imports], packages)] if imports else []),
        )
    )


if __name__ == "__main__":
    main()
