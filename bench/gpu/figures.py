"""The figures: what is measured, in which sort of process, how long it takes about, and what is wanted of it.

In the order in which they are measured: what matters most first, and a group's figures one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.figure import COMPILED, PLAIN, PROCESSES, Figure, Goal

_PICTURE = {"size": 1024, "steps": 28}
_SMALL = {"size": 64, "steps": 2}
_COUNTS = ("1", "2", "4")
_BITS_KEPT = Goal("the weights keep their bits (1: yes)", ("bits_kept",), at_least=1)
_COMPILED = ("rows", "COMPILE=1")
_TESTS = (Goal("GPU tests that fail", ("failed",), at_most=0), Goal("GPU tests that pass", ("passed",), at_least=1))
# These compile for minutes, for which the other tests are not to wait.
COMPILING_TESTS = ("tests/bench/test_rendering.py", "tests/generate/test_compiled.py")

FIGURES: tuple[Figure, ...] = (
    Figure(
        "tests",
        "tests marked gpu, but those of compiled code",
        PROCESSES,
        "bench.gpu.suite:measure",
        110,
        {"files": [], "limit_s": 300},
        {"files": ["tests/generate/test_load.py"], "limit_s": 240},
        _TESTS,
    ),
    Figure(
        "whole_request",
        "whole warm request with LoRAs / plain request, through the worker",
        PLAIN,
        "bench.gpu.requests:whole",
        45,
        {**_PICTURE, "repeats": 3},
        {**_SMALL, "repeats": 1},
        (
            Goal("whole request, 1 LoRA / plain", ("ratio", "1", "median"), at_most=1.03),
            Goal("whole request, 4 LoRAs / plain", ("ratio", "4", "median"), at_most=1.06),
        ),
    ),
    Figure(
        "handler",
        "whole request through the handler / bare diffusers call",
        PLAIN,
        "bench.overhead:run_on",
        28,
        {**_PICTURE, "repeats": 3},
        {**_SMALL, "repeats": 1},
        (Goal("handler / bare diffusers", ("ratio",), at_most=1.02),),
    ),
    Figure(
        "switching",
        "LoRAs applied and restored, against stock load and unload",
        PLAIN,
        "bench.lora_switch:run_on",
        75,
        {"size": 1024, "steps": 2, "repeats": 5, "stock_repeats": 2, "pairs": 10, "channels_last": False},
        {**_SMALL, "steps": 1, "repeats": 1, "stock_repeats": 1, "pairs": 1, "channels_last": False},
        (
            *(
                Goal(f"switch / stock load and unload, LoRAs: {count}", ("loras", count, "switch_ratio"), at_most=0.05)
                for count in _COUNTS
            ),
            *(
                Goal(f"switch / moving the weights, LoRAs: {count}", ("loras", count, "ours", "limit_ratio"), at_most=3)
                for count in _COUNTS
            ),
        ),
    ),
    Figure(
        "memory",
        "peak memory of requests, beside the weights",
        PLAIN,
        "bench.gpu.memory:measure",
        15,
        {"size": 1024, "steps": 2},
        _SMALL,
    ),
    Figure(
        "lora_layers",
        "a switch by the number of layers and of LoRAs",
        PLAIN,
        "bench.lora_costs:layers_on",
        25,
        {"repeats": 3, "counts": [1, 2, 4], "shares": [0.1, 0.25, 0.5, 1.0]},
        {"repeats": 1, "counts": [1, 2], "shares": [0.5, 1.0]},
        (_BITS_KEPT,),
    ),
    Figure(
        "lora_formats",
        "a switch by the file's format",
        PLAIN,
        "bench.lora_costs:formats_on",
        25,
        {"repeats": 3},
        {"repeats": 1},
        (
            _BITS_KEPT,
            *(
                Goal(f"switch, {name} / LoRA", ("cases", name, "against_first", "median"))
                for name in ("LoHa", "LoKr", "DoRA", "OFT")
            ),
        ),
    ),
    Figure(
        "lora_ranks",
        "a switch by the LoRA's rank",
        PLAIN,
        "bench.lora_costs:ranks_on",
        25,
        {"repeats": 3, "ranks": [4, 16, 32, 64, 128, 256]},
        {"repeats": 1, "ranks": [4, 8]},
        (_BITS_KEPT,),
    ),
    Figure(
        "utilisation",
        "device busy over a mixed run with WORKER_CONCURRENCY=2",
        PROCESSES,
        "bench.gpu.utilisation:measure",
        90,
        {"jobs": 50, "shrink": 1},
        {"jobs": 6, "shrink": 16},
        (Goal("device busy over the mixed run, percent", ("busy_percent",), at_least=95),),
    ),
    Figure(
        "cold_start",
        "process start to first picture, against a bare script on diffusers",
        PROCESSES,
        "bench.cold_start:run_on",
        110,
        {"size": 1024, "steps": 8, "repeats": 2},
        {"size": 64, "steps": 2, "repeats": 1},
        (
            Goal("start to first picture, local run / bare script", ("ratio_to_bare", "local", "median"), at_most=1.1),
            Goal("start to first picture, on a queue / bare script", ("ratio_to_bare", "queue", "median"), at_most=1.1),
        ),
    ),
    Figure(
        "compile_cache",
        "process start to first picture with COMPILE=1: empty and filled COMPILE_CACHE_DIR",
        PROCESSES,
        "bench.compile_cache:run_on",
        150,
        {"size": 1024, "backend": "inductor"},
        {"size": 64, "backend": "eager"},
        (
            Goal("start to first picture, filled / empty folder", ("filled_against_empty",)),
            Goal("start to first picture, COMPILE=0 / empty folder", ("uncompiled_against_empty",)),
        ),
    ),
    Figure(
        "rendering",
        "each setting's speed and pixels, against worker-sdxl's set-up",
        COMPILED,
        "bench.rendering:run_on",
        140,
        {**_PICTURE, "repeats": 2, "backend": "inductor", "parts": ["table", "switch"]},
        {**_SMALL, "repeats": 1, "backend": "eager", "parts": ["table", "switch"]},
        (
            Goal("pictures per second, COMPILE=1 / worker-sdxl's", ("table", *_COMPILED, "ratio", "median"), None, 1.8),
            Goal("largest difference of its pixels, of 255", ("table", *_COMPILED, "difference", "max"), at_most=2),
            Goal("graphs compiled while LoRAs are switched", ("switch", "new_graphs"), at_most=0),
        ),
    ),
    Figure(
        "images_per_second",
        "images per second of the worker with COMPILE=1, against worker-sdxl's",
        COMPILED,
        "bench.gpu.images:measure",
        50,
        {**_PICTURE, "repeats": 3, "backend": "inductor"},
        {**_SMALL, "repeats": 1, "backend": "eager"},
        (
            Goal("images per second, one job at a time", ("ratio", "one at a time"), at_least=1.8),
            Goal("images per second, WORKER_CONCURRENCY=2", ("ratio", "two at a time"), at_least=1.8),
        ),
    ),
    Figure(
        "merge_kernel",
        "merging alone, files on the device: kernel, tiles and torch / copying the weights once",
        PLAIN,
        "bench.merge_kernel:run_on",
        30,
        {"repeats": 5, "counts": ["1", "2", "4"]},
        {"repeats": 1, "counts": ["1", "2"]},
        (
            _BITS_KEPT,
            *(
                Goal(f"merging / copying once, LoRAs: {count}", ("cases", "kernel", count, "copy_ratio", "median"))
                for count in _COUNTS
            ),
        ),
    ),
    Figure(
        "steps",
        "what waiting for the device costs a step, by sampler, and what previews cost",
        PLAIN,
        "bench.steps:run_on",
        50,
        {
            "size": 512,
            "steps": 12,
            "repeats": 3,
            "samplers": ["K_EULER", "PNDM", "DDIM", "DDPM", "UniPC", "SA-Solver", "LCM", "TCD"],
        },
        {**_SMALL, "repeats": 1, "samplers": ["K_EULER", "UniPC"]},
        (
            Goal("K_EULER / with diffusers' schedule", ("samplers", "K_EULER", "ratio", "median"), at_most=1.02),
            Goal("UniPC / with diffusers' schedule", ("samplers", "UniPC", "ratio", "median"), at_most=1.02),
            Goal("with previews / without", ("previews", "colours", "ratio", "median"), at_most=1.02),
            Goal("with previews of a VAE / without", ("previews", "vae", "ratio", "median")),
        ),
    ),
    Figure(
        "lora_convolutions",
        "merging into channels_last convolutions / contiguous ones",
        PLAIN,
        "bench.convolutions:convolutions_on",
        5,
        {"repeats": 7, "convolution": [640, 640, 3, 3]},
        {"repeats": 1, "convolution": [16, 8, 3, 3]},
        (Goal("merging, channels_last / contiguous", ("ratio", "median"), at_most=1.1),),
    ),
    Figure(
        "tests_compiled",
        "tests marked gpu of compiled code",
        PROCESSES,
        "bench.gpu.suite:measure",
        150,
        {"files": COMPILING_TESTS, "limit_s": 420},
        {"files": ["tests/generate/test_load.py"], "limit_s": 240},
        _TESTS,
    ),
)


def chosen(names: Sequence[str], figures: Sequence[Figure] = FIGURES) -> list[Figure]:
    """The figures of these names, all for none; raises ValueError, naming those that do not exist."""
    known = {figure.name for figure in figures}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no figure is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [figure for figure in figures if not names or figure.name in names]
