"""What reading and encoding prompts costs, as a share of the request.

On the narrow SDXL (real topology, real text encoder depths, about 1/8 of the width) at 28 steps: a plain prompt, which
diffusers encodes, a weighted one, and one of 400 tokens, each with a negative prompt of one chunk. Then the parser
alone, on 10,000 and 100,000 brackets. Prints tables of ratios and writes everything to bench/results/.

    python -m bench.prompts [--repeats 5] [--side 512] [--steps 28] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.report import machine, table, write_result
from sdxl_worker import prompts, topology
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest

NEGATIVE = "blurry, low quality, watermark, text"
WORDS = "a lighthouse on a cliff at dusk, heavy sea, volumetric light, "
CASES = {
    "plain": (WORDS, "plain"),
    "weighted": (f"({WORDS}:1.2)", "a1111"),
    "400 tokens": ("x, " * 200, "a1111"),
}
BRACKETS: dict[str, Callable[[int], str]] = {
    "opened": lambda count: "(" * count,
    "nested": lambda count: "(" * (count // 2) + ")" * (count // 2),
    "pairs": lambda count: "(a)" * (count // 2),
    "both kinds": lambda count: "[(" * (count // 2),
}


def seconds(function: Callable[[], Any], device: str) -> float:
    """The time that one call takes, with all that it asks of the device."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def encoding(repeats: int, side: int, steps: int, device: str) -> dict[str, dict[str, float]]:
    """Medians of whole renders and of their encodings, alternating, and the median of the pairs' ratios."""
    size = topology.FULL if device.startswith("cuda") else topology.NARROW
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipeline = topology.build_sdxl(size, dtype=dtype, device=device)
    pipeline.set_progress_bar_config(disable=True)
    results = {}
    for name, (prompt, syntax) in CASES.items():
        request = GenerationRequest(
            prompt,
            negative_prompt=NEGATIVE,
            prompt_syntax=syntax,
            height=side,
            width=side,
            num_inference_steps=steps,
            seed=1,
            scheduler="K_EULER",
        )

        def encode(request: GenerationRequest = request) -> None:
            with torch.no_grad(), prompts.applied(pipeline, request) as conditioning:
                arguments = conditioning.arguments([0])
                if "prompt" in arguments:
                    pipeline.encode_prompt(**arguments, device=torch.device(device))

        def whole(request: GenerationRequest = request) -> None:
            render(pipeline, request)

        encode()
        whole()
        pairs = [(seconds(encode, device), seconds(whole, device)) for _ in range(repeats)]
        results[name] = {
            "encode_s": statistics.median(pair[0] for pair in pairs),
            "request_s": statistics.median(pair[1] for pair in pairs),
            "share": statistics.median(part / all_of_it for part, all_of_it in pairs),
        }
    return results


def parsing(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds that the parser takes, the least of the repeats."""

    def least(text: str) -> float:
        return 1000 * min(seconds(lambda: prompts.parse(text, "a1111"), "cpu") for _ in range(repeats))

    return {name: {str(count): least(make(count)) for count in (10_000, 100_000)} for name, make in BRACKETS.items()}


def main() -> None:
    """Measure, print tables, write bench/results/prompts_DEVICE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    encoded = encoding(options.repeats, options.side, options.steps, options.device)
    parsed = parsing(options.repeats)
    results = {
        **machine(options.device.partition(":")[0]),
        "side": options.side,
        "steps": options.steps,
        "encoding": encoded,
        "parsing_ms": parsed,
    }
    path = write_result(f"prompts_{options.device.partition(':')[0]}", results)
    shares = [
        [name, f"{1000 * one['encode_s']:.0f} ms", f"{one['request_s']:.2f} s", f"{100 * one['share']:.2f} %"]
        for name, one in encoded.items()
    ]
    brackets = [[name, *(f"{spent:.1f} ms" for spent in one.values())] for name, one in parsed.items()]
    sys.stdout.write(f"{table(['prompt', 'reading and encoding', 'request', 'share'], shares)}\n\n")
    sys.stdout.write(f"{table(['brackets', '10,000', '100,000'], brackets)}\n\nwritten to {path}\n")


if __name__ == "__main__":
    main()
