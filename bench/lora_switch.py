"""What a LoRA costs: merged into the resident weights by this worker, against stock diffusers, in one run.

Random weights, real topology: on the CPU an SDXL of about 1/8 width (float32), on a GPU the full 2.6 billion
parameters (float16). For 1, 2 and 4 LoRAs of rank 32 on every linear layer of the UNet and both text encoders it
measures apply, restore, the cost of a denoising step, the whole request, peak memory, and whether plain renders keep
their bits. Prints one table of ratios and writes everything to bench/results/.

    python -m bench.lora_switch [--device cuda] [--steps 28] [--size 1024] [--repeats 5] [--channels-last]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.instruments import Clock, Memory, spread
from bench.lora_files import RANK, SCALE, linear_layers, write_loras
from bench.memory_limit import MemoryLimit, loras_of, weights_of
from bench.models import random_pipeline
from bench.report import machine, table, write_result
from bench.timed_request import Request
from sdxl_worker.lora.engine import LoraEngine

COUNTS = (1, 2, 4)


def step_ratio(engine: LoraEngine, paths: list[Path], request: Request, pairs: int) -> float:
    """The fastest UNet pass with the LoRAs merged in, against the fastest without, taken in turns.

    A step of ours differs from a plain one by nothing but the values of the weights, and a shared machine's pace
    changes by tens of percent from second to second: whole renders cannot tell one percent, neighbouring passes can.
    On the CPU with one thread, since two wait for each other.
    """
    pipeline, clock = request.pipeline, request.clock
    unet, device, dtype = pipeline.unet, pipeline.device, pipeline.unet.dtype
    side, width = request.size // 8, unet.config.cross_attention_dim
    latents = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    states = torch.randn(2, 77, width, device=device, dtype=dtype)
    pooled = torch.randn(2, pipeline.text_encoder_2.config.projection_dim, device=device, dtype=dtype)
    sizes = torch.tensor(
        [[request.size, request.size, 0, 0, request.size, request.size]] * 2, device=device, dtype=dtype
    )
    conditions = {"text_embeds": pooled, "time_ids": sizes}

    def seconds(prepare: Callable[[], None]) -> float:
        prepare()
        return clock.time(lambda: unet(latents, 500, encoder_hidden_states=states, added_cond_kwargs=conditions))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        both = [(seconds(lambda: ours_apply(engine, paths)), seconds(engine.restore)) for _ in range(pairs)]
    torch.set_num_threads(threads)
    return min(merged for merged, _ in both) / min(plain for _, plain in both)


def stock_apply(pipeline: Any, paths: list[Path]) -> None:
    """diffusers' own way, from file."""
    names = [f"adapter{index}" for index in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, [SCALE] * len(names))


def ours_apply(engine: LoraEngine, paths: list[Path]) -> None:
    """This worker's way; files it has read before come from host memory."""
    engine.apply(loras_of(engine, paths))


def measure(apply: Callable[[], None], undo: Callable[[], Any], request: Request, memory: Memory, repeats: int) -> dict:
    """Medians over `repeats` alternations, each followed by a plain render, in one interleaved sequence."""
    clock = request.clock
    rows: dict[str, list[float]] = {
        name: [] for name in ("apply", "restore", "whole", "step", "plain_whole", "plain_step")
    }
    memory.reset()
    for _ in range(repeats):
        rows["apply"].append(clock.time(apply))
        whole, step, picture = request.timed()
        rows["restore"].append(clock.time(undo))
        plain_whole, plain_step, plain = request.timed()
        rows["whole"].append(whole + rows["apply"][-1] + rows["restore"][-1])
        rows["step"].append(step)
        rows["plain_whole"].append(plain_whole)
        rows["plain_step"].append(plain_step)
    result: dict[str, Any] = {f"{name}_s": statistics.median(values) for name, values in rows.items()}
    # Ratios of neighbours, so that a machine that slows down half-way does not show as a cost.
    result["step_ratio"] = statistics.median(a / b for a, b in zip(rows["step"], rows["plain_step"], strict=True))
    result["whole_ratio"] = statistics.median(a / b for a, b in zip(rows["whole"], rows["plain_whole"], strict=True))
    result["spread"] = {name: spread(values) for name, values in rows.items()}
    result["spread"]["whole_ratio"] = spread([a / b for a, b in zip(rows["whole"], rows["plain_whole"], strict=True)])
    result["peak_bytes"] = memory.peak()
    result["changed_picture"] = bool((picture != plain).any())
    result["plain_picture"] = plain
    return result


def compare(
    pipeline: Any, engine: LoraEngine, paths: list[Path], request: Request, memory: Memory, options: Any
) -> dict:
    """Ours and stock for the same files, and whether the plain picture is still the one from before."""
    before = request.render()
    cold = request.clock.time(lambda: ours_apply(LoraEngine(pipeline, 0), paths))
    ours = measure(lambda: ours_apply(engine, paths), engine.restore, request, memory, options.repeats)
    ours["step_ratio"] = step_ratio(engine, paths, request, options.pairs)
    stock = measure(
        lambda: stock_apply(pipeline, paths), pipeline.unload_lora_weights, request, memory, options.stock_repeats
    )
    for result in (ours, stock):
        result["plain_bits_kept"] = bool(np.array_equal(result.pop("plain_picture"), before))
    switch = (ours["apply_s"] + ours["restore_s"]) / (stock["apply_s"] + stock["restore_s"])
    limit = MemoryLimit(weights_of(pipeline, loras_of(engine, paths)))
    # After a first time, which finds the pages and the caches.
    _, *copies = [request.clock.time(limit.copy_twice) for _ in range(options.repeats + 1)]
    ours["limit_s"] = statistics.median(copies)
    ours["limit_ratio"] = (ours["apply_s"] + ours["restore_s"]) / ours["limit_s"]
    return {"ours": ours, "stock": stock, "cold_read_and_apply_s": cold, "switch_ratio": switch}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`run_on` on a pipeline of random weights."""
    # Stock loading reports every key it misses, thousands of lines of them.
    transformers.logging.set_verbosity_error()
    pipeline = random_pipeline(options.device)
    return run_on(pipeline, options)


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements on a ready pipeline, which keeps its weights, as JSON-ready numbers."""
    if options.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    device, dtype = pipeline.device.type, pipeline.unet.dtype
    request, memory = Request(pipeline, Clock(device), options.size, options.steps), Memory(device)
    request.render()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_loras(pipeline, Path(folder), max(COUNTS))
        engine = LoraEngine(pipeline, 8 * 2**30)
        for count in COUNTS:
            ours_apply(engine, paths[:count])
            engine.restore()
            results[str(count)] = compare(pipeline, engine, paths[:count], request, memory, options)
            sys.stderr.write(f"{count} LoRA(s) measured\n")
    modules = sum(1 for _ in linear_layers(pipeline))
    parameters = sum(
        value.numel()
        for root in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        for value in root.parameters()
    )
    model = {
        "parameters": parameters,
        "lora_modules": modules,
        "rank": RANK,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {"model": model, "options": vars(options), "loras": results}


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table: one row per figure, one column per number of LoRAs."""

    def line(title: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [title, *(value(results["loras"][str(count)]) for count in COUNTS)]

    return [
        line("apply + restore, warm, against stock load + unload", lambda r: f"1/{1 / r['switch_ratio']:.0f}"),
        line("apply + restore, warm (ms)", lambda r: f"{1e3 * (r['ours']['apply_s'] + r['ours']['restore_s']):.0f}"),
        line("apply + restore, warm, against moving the weights", lambda r: f"{r['ours']['limit_ratio']:.2f}"),
        line("stock load + unload (ms)", lambda r: f"{1e3 * (r['stock']['apply_s'] + r['stock']['restore_s']):.0f}"),
        line("read from disk and apply, cold (ms)", lambda r: f"{1e3 * r['cold_read_and_apply_s']:.0f}"),
        line("denoising step against none: ours", lambda r: f"{r['ours']['step_ratio']:.3f}"),
        line("denoising step against none: stock", lambda r: f"{r['stock']['step_ratio']:.3f}"),
        line("whole request against none: ours", lambda r: f"{r['ours']['whole_ratio']:.3f}"),
        line("whole request against none: stock", lambda r: f"{r['stock']['whole_ratio']:.3f}"),
        line("peak memory, ours / stock", lambda r: f"{r['ours']['peak_bytes'] / r['stock']['peak_bytes']:.2f}"),
        line("plain renders keep their bits: ours", lambda r: "yes" if r["ours"]["plain_bits_kept"] else "no"),
        line("plain renders keep their bits: stock", lambda r: "yes" if r["stock"]["plain_bits_kept"] else "no"),
    ]


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of the request (default 28)")
    parser.add_argument("--size", type=int, help="picture side in pixels (default 1024 on a GPU, 256 on the CPU)")
    parser.add_argument("--repeats", type=int, default=5, help="alternations measured for this worker (default 5)")
    parser.add_argument("--stock-repeats", type=int, default=3, help="alternations measured for stock (default 3)")
    parser.add_argument("--pairs", type=int, default=30, help="UNet passes with and without LoRAs (default 30)")
    parser.add_argument(
        "--channels-last", action="store_true", help="convolutions in that memory order, as COMPILE=1 has"
    )
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: torch's own)")
    options = parser.parse_args()
    options.size = options.size or (1024 if options.device == "cuda" else 256)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {**machine(options.device), **run(options)}
    path = write_result(f"lora_switch{'_channels_last' if options.channels_last else ''}_{options.device}", results)
    sys.stdout.write(table(["figure", *(f"{count} LoRA" for count in COUNTS)], rows(results)) + f"\n{path}\n")


if __name__ == "__main__":
    main()
