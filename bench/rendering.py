"""Which setting draws how fast, and what it does to the picture: one table, measured side by side in one run.

The baseline is worker-sdxl's set-up (github.com/runpod-workers/worker-sdxl, handler.py): StableDiffusionXLPipeline in
float16 with the float16 VAE on the GPU, under inference_mode, DDIM made by `from_config` of the checkpoint's scheduler,
guidance 7.5, eager. Left out is what would only slow it down: the refiner that it sends every picture through, and
enable_model_cpu_offload. Its xformers is not installed here: diffusers takes torch's attention, and the row
ATTENTION=efficient is the kernel that torch has from xformers.

Each row is this worker's `render` of the same request with one setting changed. In every round all rows are drawn one
after the other, so that a ratio compares neighbours. Random weights: on a GPU the full 2.6 billion parameters in
float16, on the CPU an SDXL of about 1/8 width in float32. Their pictures vary as pictures do (the results hold the
deviation, and how far another prompt lies), so that a difference of 2 of 255 means something.

Then what a LoRA switch costs beside compiled code, how many graphs it compiles (none), and, in processes of their own,
how long a worker with COMPILE=1 takes to its first picture with an empty COMPILE_CACHE_DIR and with a filled one.

    python -m bench.rendering [--device cuda] [--size 1024] [--steps 28] [--repeats 3] [--parts table,switch,cache]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.compile_cache import compile_cache_on
from bench.compiled_state import Compiled, graphs
from bench.instruments import Clock, spread
from bench.lora_switch import write_loras
from bench.models import random_pipeline
from bench.report import machine, table, write_result
from sdxl_worker.generate import attention
from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import GenerationRequest, LoraScale
from sdxl_worker.request.validation import validate_request

BASELINE = "worker-sdxl's set-up"
PROMPT, OTHER_PROMPT = "a lighthouse at dusk", "an old tree in the snow"
SEED, GUIDANCE, SCHEDULER = 1, 7.5, "DDIM"
# What COMPILE=1 is meant to reach at 1024 x 1024 and 28 steps.
GOAL_RATIO, GOAL_DIFFERENCE = 1.8, 2
SWITCHES = 5

# Fields of the request that give speed for another picture; those that this version does not have are left out.
OPT_INS: tuple[Mapping[str, Any], ...] = ({"cfg_end": 0.8}, {"cfg_end": 0.6}, {"deep_cache": 2}, {"deep_cache": 3})

State = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Row:
    """One setting: the state of the pipeline around the drawing, and the request's fields that differ."""

    name: str
    state: State = contextlib.nullcontext
    fields: Mapping[str, Any] = field(default_factory=dict)
    draws: Callable[[Any, GenerationRequest], Any] = lambda *made: render(*made)[0]
    once: bool = False


def rows_for(pipeline: Any, compiled: Compiled) -> list[Row]:
    """What can be measured with this device and this version of the request; the baseline comes first."""
    kernels = [name for name in attention.KERNELS if attention.usable(name, pipeline.device, pipeline.unet.dtype)]
    rows = [
        Row(BASELINE, draws=bare),
        Row("this worker as it comes"),
        Row("channels_last", compiled.layout.entered),
        Row("COMPILE=1", compiled.entered),
        *(Row(f"ATTENTION={name}", functools.partial(attention.chosen, name), once=name == "math") for name in kernels),
    ]
    known = {entry.name for entry in dataclasses.fields(GenerationRequest)}
    for fields in OPT_INS:
        if fields.keys() <= known:
            named = ", ".join(f"{name}={value}" for name, value in fields.items())
            rows += [
                Row(named, fields=fields, once=True),
                Row(f"COMPILE=1, {named}", compiled.entered, fields, once=True),
            ]
    return rows


def bare(pipeline: Any, request: GenerationRequest) -> Any:
    """The picture as worker-sdxl calls diffusers for it."""
    from diffusers import DDIMScheduler

    before = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(before.config)
    try:
        with torch.inference_mode():
            return pipeline(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                num_images_per_prompt=1,
                generator=torch.Generator(pipeline.device).manual_seed(SEED),
            ).images[0]
    finally:
        pipeline.scheduler = before


def request_of(options: argparse.Namespace, **fields: Any) -> GenerationRequest:
    """The request of all rows: worker-sdxl's scheduler and guidance."""
    common = {"prompt": PROMPT, "width": options.size, "height": options.size, "seed": SEED, "scheduler": SCHEDULER}
    return validate_request({**common, "guidance_scale": GUIDANCE, "num_inference_steps": options.steps, **fields})


class Rounds:
    """Draws rows, times them, and keeps the pictures; a row that fails says why and stops no other."""

    def __init__(self, pipeline: Any, options: argparse.Namespace) -> None:
        self._pipeline, self._options, self._clock = pipeline, options, Clock(pipeline.device.type)
        self.pictures: dict[str, np.ndarray] = {}
        self.seconds: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def draw(self, row: Row, **fields: Any) -> np.ndarray:
        """The picture of `row` as int (height, width, 3)."""
        request = request_of(self._options, **row.fields, **fields)
        return np.asarray(row.draws(self._pipeline, request)).astype(int)

    def first(self, row: Row) -> None:
        """Not timed: what is compiled, chosen or allocated the first time."""
        self._try(row, lambda: self.pictures.update({row.name: self.draw(row)}))

    def again(self, row: Row) -> None:
        """Timed."""
        times = self.seconds.setdefault(row.name, [])
        self._try(row, lambda: times.append(self._clock.time(lambda: self.draw(row))))

    def _try(self, row: Row, action: Callable[[], None]) -> None:
        if row.name in self.failed:
            return
        try:
            with row.state():
                action()
        except Exception as error:
            self.failed[row.name] = f"{type(error).__name__}: {error}"[:500]
            sys.stderr.write(f"{row.name}: {self.failed[row.name]}\n")

    def result(self, row: Row) -> dict[str, Any]:
        """Speed and picture against the baseline's of the same round."""
        if row.name in self.failed:
            return {"failed": self.failed[row.name]}
        own = self.seconds[row.name]
        return {
            "seconds": spread(own),
            "images_per_second": 1 / statistics.median(own),
            "ratio": spread([base / mine for base, mine in zip(self.seconds[BASELINE], own, strict=False)]),
            "difference": difference(self.pictures[row.name], self.pictures[BASELINE]),
        }


def table_on(pipeline: Any, options: argparse.Namespace, compiled: Compiled) -> dict[str, Any]:
    """Speed and picture of every row against the baseline."""
    rows, rounds = rows_for(pipeline, compiled), Rounds(pipeline, options)
    for row in rows:
        rounds.first(row)
    before = graphs()
    for number in range(options.repeats):
        for row in rows:
            # What is slow, or tells little beside the rest, is to be known and not waited for.
            if number == 0 or not row.once:
                rounds.again(row)
    new_graphs = graphs() - before
    results = {row.name: rounds.result(row) for row in rows}
    baseline = rounds.pictures[BASELINE]
    other = rounds.draw(rows[0], prompt=OTHER_PROMPT)
    goal = results["COMPILE=1"]
    reached = "failed" not in goal and (
        goal["ratio"]["median"] >= GOAL_RATIO and goal["difference"]["max"] <= GOAL_DIFFERENCE
    )
    return {
        "rows": results,
        "new_graphs_while_measured": new_graphs,
        "picture": {"deviation": float(baseline.std()), "another_prompt": difference(other, baseline)},
        "goal": {"setting": "COMPILE=1", "ratio": GOAL_RATIO, "difference": GOAL_DIFFERENCE, "reached": reached},
    }


def difference(picture: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Greatest and mean difference of a channel (0 to 255), and the share of pixels with any."""
    apart = np.abs(picture - baseline)
    return {"max": int(apart.max()), "mean": float(apart.mean()), "share": float((apart > 0).any(-1).mean())}


def switch_on(pipeline: Any, options: argparse.Namespace, compiled: Compiled) -> dict[str, Any]:
    """Seconds to merge a LoRA and take it out again, eager and compiled in turns, and the graphs its pictures need.

    Each with an engine of its own: the weights lie in another order.
    """
    states: dict[str, State] = {"eager": contextlib.nullcontext, "compiled": compiled.entered}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    engines: dict[str, LoraEngine] = {}
    changed, new_graphs = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write_loras(pipeline, Path(folder), 1)
        for _ in range(options.repeats):
            for name, state in states.items():
                with state():
                    engine = engines.setdefault(name, LoraEngine(pipeline, 2**30))
                    before = graphs()
                    times, changed[name] = switches(pipeline, engine, path, options)
                    seconds[name] += times
                    new_graphs += graphs() - before
    ratios = [ours / eager for ours, eager in zip(seconds["compiled"], seconds["eager"], strict=True)]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "compiled_against_eager": spread(ratios),
        "new_graphs": new_graphs,
        "changed_picture": changed,
    }


def switches(
    pipeline: Any, engine: LoraEngine, path: Path, options: argparse.Namespace
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each of SWITCHES switches, with a picture drawn in each, and what the last did to the picture."""
    clock, request = Clock(pipeline.device.type), request_of(options, num_inference_steps=1, scheduler="K_EULER")

    def picture() -> np.ndarray:
        return np.asarray(render(pipeline, request)[0]).astype(int)

    plain, seconds = picture(), []
    # The first two make what is kept: copies of the weights, and which kernels fit them.
    for number in range(1, SWITCHES + 3):
        loras = [(engine.read(path), LoraScale.uniform(0.1 * number))]
        applying = clock.time(functools.partial(engine.apply, loras))
        drawn = picture()
        whole = applying + clock.time(engine.restore)
        if number > 2:
            seconds.append(whole)
    return seconds, difference(drawn, plain)


PARTS: Mapping[str, Callable[[Any, argparse.Namespace, Compiled], dict[str, Any]]] = {
    "table": table_on,
    "switch": switch_on,
    "cache": lambda pipeline, options, _: compile_cache_on(pipeline.device.type, options.size, options.backend),
}


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The parts of `options.parts` on a ready pipeline, which is as it was afterwards; JSON-ready."""
    compiled = Compiled(pipeline, options.backend)
    return {"options": vars(options), **{part: PARTS[part](pipeline, options, compiled) for part in options.parts}}


def lines(results: dict[str, Any]) -> list[list[str]]:
    """The table of settings, one line for each row."""
    found = []
    for name, result in results["table"]["rows"].items():
        if "failed" in result:
            found.append([name, "failed", "", "", "", "", ""])
            continue
        ratio, apart = result["ratio"], result["difference"]
        found.append(
            [
                name,
                f"{result['images_per_second']:.3f}",
                f"{ratio['median']:.3f}",
                f"{ratio['min']:.3f} - {ratio['max']:.3f}",
                str(apart["max"]),
                f"{apart['mean']:.4f}",
                f"{100 * apart['share']:.2f} %",
            ]
        )
    return found


HEADER = ("setting", "pictures / s", "speed", "least - most", "max of 255", "mean of 255", "pixels that differ")


def summary(results: dict[str, Any]) -> str:
    """What was measured, for people."""
    said = []
    if "table" in results:
        goal, picture = results["table"]["goal"], results["table"]["picture"]
        said.append(table(HEADER, lines(results)))
        said.append(
            f"goal on a GPU, {goal['setting']} {goal['ratio']} times as fast within {goal['difference']} of 255: "
            f"{'reached' if goal['reached'] else 'not reached'}; pictures deviate by {picture['deviation']:.0f}, and "
            f"another prompt's by {picture['another_prompt']['mean']:.1f} of 255 on average"
        )
    if "switch" in results:
        switch = results["switch"]
        said.append(
            f"LoRA merged and taken out, compiled against eager: {switch['compiled_against_eager']['median']:.2f}; "
            f"new graphs: {switch['new_graphs']}"
        )
    if "cache" in results:
        cache = results["cache"]
        said.append(
            f"start to first picture with COMPILE=1, compiled code kept against an empty folder: "
            f"{cache['filled_against_empty']:.2f}; with COMPILE=0: {cache['uncompiled_against_empty']:.2f}"
        )
    return "\n".join(said)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="picture side in pixels (default 1024 on a GPU, 192 on the CPU)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 28 on a GPU, 4 on the CPU)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which every row is drawn (default 3)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of table, switch, cache (default all)")
    parser.add_argument("--backend", default="inductor", help="torch.compile's (default inductor)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch (default 1)")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.size = options.size or (1024 if on_gpu else 192)
    options.steps = options.steps or (28 if on_gpu else 4)
    options.parts = options.parts.split(",")
    torch.set_num_threads(options.threads)
    results = {**machine(options.device), **run_on(random_pipeline(options.device), options)}
    path = write_result(f"rendering_{options.device}", results)
    sys.stdout.write(f"{summary(results)}\n{path}\n")


if __name__ == "__main__":
    main()
