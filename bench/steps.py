"""What waiting for the device costs a step, by sampler, and what previews cost a run, side by side in one run.

Each picture is drawn by the worker, whose schedule stays in host memory, and with the timesteps on the device as
diffusers puts them; on a GPU the waits of a picture are counted by CUDA's sync debug mode. Small pictures, where the
CPU has the least time to spare. Then the same picture without previews, with one begun as soon as the last is finished
(far more than RunPod is sent), by the formula and by a VAE of taesdxl's size with random weights.

    python -m bench.steps [--device cuda] [--model full] [--size 512] [--steps 12] [--repeats 3] [--samplers DDIM ...]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from PIL import Image

from bench.instruments import Clock, spread
from bench.models import SIZES, random_pipeline
from bench.report import machine, table, write_result
from sdxl_worker import topology
from sdxl_worker.generate import samplers
from sdxl_worker.generate.previews import Previews
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import scheduler_names
from tests.support.pictures import farthest

# Those that diffusers makes wait at each step, and one that it does not.
SAMPLERS = ("K_EULER", "PNDM", "DDIM", "DDPM", "UniPC", "SA-Solver", "LCM", "TCD")
_WAITED = "synchronizing CUDA operation"


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a picture of options.size in options.steps steps, options.repeats times each way, alternating.

    `samplers`: by name the ratio of the worker's time to that with diffusers' schedule, the waits of a picture (None on
    the CPU, which has nothing to wait for) and the largest difference of the two pictures, of 255. `previews`: by kind
    the ratio to the time without, and how many were made in a picture.
    """
    return {
        "size": options.size,
        "steps": options.steps,
        "repeats": options.repeats,
        "samplers": {name: _sampler(pipeline, _request(options, name), options.repeats) for name in options.samplers},
        "previews": _previews(pipeline, _request(options, "K_EULER"), options.repeats),
    }


def _request(options: argparse.Namespace, sampler: str) -> GenerationRequest:
    sides = {"width": options.size, "height": options.size}
    return GenerationRequest("a lighthouse", seed=1, num_inference_steps=options.steps, scheduler=sampler, **sides)


def _sampler(pipeline: Any, request: GenerationRequest, repeats: int) -> dict[str, Any]:
    pictures: dict[str, Image.Image] = {}

    def ours() -> None:
        (pictures["ours"],) = render(pipeline, request)

    def stock() -> None:
        with _stock_schedule():
            (pictures["stock"],) = render(pipeline, request)

    waits = {"ours": _waits(pipeline, ours), "stock": _waits(pipeline, stock)}
    times = _alternating(pipeline, {"ours": ours, "stock": stock}, repeats)
    return {
        **{f"{name}_s": spread(seconds) for name, seconds in times.items()},
        "ratio": spread([first / second for first, second in zip(times["ours"], times["stock"], strict=True)]),
        "waits": waits,
        "largest_difference": farthest(pictures["ours"], pictures["stock"]),
    }


@contextlib.contextmanager
def _stock_schedule() -> Iterator[None]:
    with mock.patch.object(samplers, "on_host", return_value=contextlib.nullcontext()):
        yield


def _waits(pipeline: Any, draw: Callable[[], None]) -> int | None:
    """How often drawing waits for the device; warms it up as well."""
    if pipeline.device.type != "cuda":
        draw()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(_WAITED in str(warning.message) for warning in caught)


def _previews(pipeline: Any, request: GenerationRequest, repeats: int) -> dict[str, Any]:
    made = {
        "none": _Beside(None),
        "colours": _Beside(Previews()),
        "vae": _Beside(Previews(_random_preview_vae(pipeline))),
    }
    draws = {kind: functools.partial(beside.draw, pipeline, request) for kind, beside in made.items()}

    def finish() -> None:
        for beside in made.values():
            beside.wait()

    for draw in draws.values():
        draw()
        finish()
    times = _alternating(pipeline, draws, repeats, finish)
    return {
        kind: {
            "seconds": spread(seconds),
            "ratio": spread([with_them / without for with_them, without in zip(seconds, times["none"], strict=True)]),
            "made": made[kind].made,
        }
        for kind, seconds in times.items()
    }


class _Beside:
    """Begins a preview at each step at which none is unfinished, and finishes it in a thread, as the worker does."""

    def __init__(self, previews: Previews | None) -> None:
        self._previews = previews
        self._thread: threading.Thread | None = None
        self.made = 0

    def on_step(self, _step: int, _steps: int, latents: torch.Tensor) -> None:
        if self._previews is None or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._previews.begin(latents))
        self._thread.start()
        self.made += 1

    def draw(self, pipeline: Any, request: GenerationRequest) -> None:
        self.made = 0
        render(pipeline, request, on_step=self.on_step)

    def wait(self) -> None:
        """Until the last preview is finished, which the next picture is not to pay for."""
        if self._thread is not None:
            self._thread.join()


def _random_preview_vae(pipeline: Any) -> Any:
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with topology.default_dtype(pipeline.unet.dtype):
            vae = AutoencoderTiny()
    return vae.to(pipeline.device).eval().requires_grad_(False)


def _alternating(
    pipeline: Any, actions: Mapping[str, Callable[[], Any]], repeats: int, after: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    clock = Clock(pipeline.device.type)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats):
        for name in list(actions) if number % 2 else reversed(list(actions)):
            times[name].append(clock.time(actions[name]))
            after()
    return times


def _report(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['ours_s']['median']:.3f}",
            f"{row['ratio']['median']:.3f}",
            *(str(row["waits"][kind]) for kind in ("ours", "stock")),
            str(row["largest_difference"]),
        ]
        for name, row in results["samplers"].items()
    ]
    samplers_table = table(["sampler", "s", "/ diffusers'", "waits", "diffusers' waits", "difference"], rows)
    rows = [[kind, f"{row['ratio']['median']:.3f}", str(row["made"])] for kind, row in results["previews"].items()]
    return f"{samplers_table}\n\n{table(['previews', '/ without', 'made'], rows)}\n"


def main() -> None:
    """Measure, print tables, write bench/results/steps.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(SIZES), default="")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samplers", nargs="+", choices=scheduler_names(), default=SAMPLERS)
    options = parser.parse_args()
    results = run_on(random_pipeline(options.device, options.model), options)
    sys.stdout.write(_report(results))
    write_result("steps", {**machine(options.device), **results})


if __name__ == "__main__":
    main()
