"""From process start to the first picture with COMPILE=1: with an empty COMPILE_CACHE_DIR, with what that process left
there, and with COMPILE=0. Each in a process of its own, as a worker does it, on random weights."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What a process is to be stopped after, where a compiler hangs.
LONGEST_S = 420


def run_on(_pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """`compile_cache_on` as a figure of `bench.gpu`; what is compiled stays in `options.compiled_code` for others."""
    shutil.rmtree(options.compiled_code, ignore_errors=True)
    return compile_cache_on(options.device, options.size, options.backend, options.compiled_code)


def compile_cache_on(device: str, side: int, backend: str = "inductor", keep_in: str = "") -> dict[str, Any]:
    """Seconds of each stage for the three starts, and what the second and the uncompiled one are of the first.

    The processes build pipelines of their own. `keep_in` is an empty folder, a temporary one if it is not said.
    """
    with contextlib.nullcontext(keep_in) if keep_in else tempfile.TemporaryDirectory() as folder:
        starts = {
            "empty": _start(device, side, 1, folder, backend),
            "filled": _start(device, side, 1, folder, backend),
            "COMPILE=0": _start(device, side, 0, folder, backend),
        }
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    first = starts["empty"]["whole_s"]
    return {
        "starts": starts,
        "filled_against_empty": starts["filled"]["whole_s"] / first,
        "uncompiled_against_empty": starts["COMPILE=0"]["whole_s"] / first,
        "folder_bytes": size,
    }


def _start(device: str, side: int, compiled: int, folder: str, backend: str) -> dict[str, Any]:
    own = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.compile_cache",
            device,
            str(side),
            str(compiled),
            folder,
            backend,
            str(time.time()),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_picture(device: str, side: int, compiled: int, folder: str, backend: str, begun: float) -> dict[str, Any]:
    from sdxl_worker.serving.launch import keep_compiled_code
    from sdxl_worker.settings import Settings

    # As in handler.py before anything heavy is imported: diffusers has torch choose a folder.
    keep_compiled_code(Settings(compile=compiled, compile_cache_dir=Path(folder)))

    import torch
    from torch._dynamo.utils import counters

    from bench.models import random_pipeline
    from sdxl_worker.generate import compiled as compiling
    from sdxl_worker.generate.render import render
    from sdxl_worker.request import GenerationRequest

    torch.set_num_threads(1)
    times = {"imports_s": time.time()}
    pipeline = random_pipeline(device, "full" if device == "cuda" else "tiny")
    times["model_s"] = time.time()
    if compiled:
        compiling.compile_in_place(pipeline, backend)
        compiling.warm_up(pipeline)
    times["compiling_s"] = time.time()
    request = GenerationRequest(prompt="a lighthouse", width=side, height=side, num_inference_steps=2, seed=1)
    render(pipeline, request)
    times["picture_s"] = time.time()
    if compiled and not compiling.is_compiled(pipeline):
        raise RuntimeError("the model cannot be compiled here")
    ends = list(times.values())
    counts = {**counters["inductor"], **counters["aot_autograd"]}
    return {
        **{name: end - start for name, start, end in zip(times, [begun, *ends], ends, strict=False)},
        "whole_s": ends[-1] - begun,
        "graphs": counters["stats"]["unique_graphs"],
        "cache": {name: count for name, count in counts.items() if "cache" in name},
    }


if __name__ == "__main__":
    _device, _side, _compiled, _folder, _backend, _begun = sys.argv[1:]
    _result = _first_picture(_device, int(_side), int(_compiled), _folder, _backend, float(_begun))
    sys.stdout.write(json.dumps(_result) + "\n")
