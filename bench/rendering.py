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
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.compile_cache import compile_cache_on
from bench.compiled_state import Compiled
from bench.compiled_switch import switch_on
from bench.models import random_pipeline
from bench.report import machine, table, write_result
from bench.settings_table import HEADER, lines, table_on

PARTS: Mapping[str, Callable[[Any, argparse.Namespace, Compiled], dict[str, Any]]] = {
    "table": table_on,
    "switch": switch_on,
    "cache": lambda pipeline, options, _: compile_cache_on(pipeline.device.type, options.size, options.backend),
}


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The parts of `options.parts` on a ready pipeline, which is as it was afterwards; JSON-ready."""
    compiled = Compiled(pipeline, options.backend)
    return {"options": vars(options), **{part: PARTS[part](pipeline, options, compiled) for part in options.parts}}


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
