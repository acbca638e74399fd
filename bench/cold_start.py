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
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.instruments import spread
from bench.report import machine, table, write_result
from bench.starts import Setting, drop_pages, imports, start_bare, start_local, start_queue

Start = Callable[[Setting, Path], dict[str, float]]
# By name, the one that the others are held against first.
CONTESTANTS: Mapping[str, Start] = {"bare": start_bare, "local": start_local, "queue": start_queue}
# From the start of the process; `rest` is what no line of the log tells: Python itself, and the SDK's way to the job.
STAGES = ("python", "imports", "model", "loras", "fitness", "job_beside", "picture", "encoding", "rest", "total")


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

    from bench.models import random_pipeline

    if pipeline is None:
        pipeline = random_pipeline(device, model or "")
    pipeline.save_pretrained(work / "model")
    os.sync()
    del pipeline
    if device == "cuda":
        torch.cuda.empty_cache()
    return work / "model"


def measure(setting: Setting, work: Path) -> dict[str, Any]:
    """Seconds of each contestant, ratios to `bare` of the same turn, stages, and what the imports take."""
    turns: list[dict[str, dict[str, float]]] = []
    failed: dict[str, str] = {}
    # The first turn writes the bytecode and warms the libraries' pages.
    for number in range(setting.repeats + 1):
        names = [name for name in CONTESTANTS if name not in failed]
        turns.append(_turn(setting, work, names if number % 2 else names[::-1], failed))
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
            name: imports(start, setting, work)
            for name, start in (("bare", start_bare), ("local", start_local))
            if name not in failed and setting.device == "cpu"
        },
    }


def _turn(setting: Setting, work: Path, names: list[str], failed: dict[str, str]) -> dict[str, dict[str, float]]:
    """What these tell, one after the other; one that does not get to a picture is written down in `failed`."""
    turn = {}
    for name in names:
        if setting.cold_cache:
            drop_pages(setting.folder)
        try:
            turn[name] = CONTESTANTS[name](setting, work)
        except (RuntimeError, AssertionError) as error:
            # It must not take the others' figures along.
            failed[name] = str(error)
    return turn


def _through(turns: list[dict[str, dict[str, float]]]) -> list[str]:
    """The contestants that came through every turn."""
    return [name for name in CONTESTANTS if all(name in turn for turn in turns)]


def _compared(values: str, ratios: str, key: str, turns: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    names = _through(turns)
    return {
        values: {name: spread([turn[name][key] for turn in turns]) for name in names},
        ratios: {name: spread([turn[name][key] / turn["bare"][key] for turn in turns]) for name in names[1:]},
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
            [f"{label}, {name} / bare", *(f"{value:.3f}" for value in found.values())]
            for name, found in results[ratios].items()
        ]
        rows += [
            [f"{label}, {name}", *(f"{value:.2f} s" for value in found.values())]
            for name, found in results[what].items()
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
