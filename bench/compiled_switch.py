"""What a LoRA switch costs beside compiled code, and how many graphs it compiles: a part of `bench.rendering`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.compiled_state import Compiled, State, graphs
from bench.instruments import Clock, spread
from bench.lora_files import write_loras
from bench.worker_sdxl import difference, request_of
from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import LoraScale

SWITCHES = 5


def switch_on(pipeline: Any, options: argparse.Namespace, compiled: Compiled) -> dict[str, Any]:
    """Seconds to merge a LoRA and take it out again, eager and compiled in turns, and the graphs its pictures need.

    Each with an engine of its own: the weights lie in another order.
    """
    states: dict[str, State] = {
        "eager": contextlib.nullcontext,
        "compiled": compiled.entered,
    }
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
