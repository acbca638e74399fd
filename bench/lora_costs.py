"""What a switch of LoRAs costs beside what memory allows: by rank, format, number of layers and of LoRAs.

A switch is merging and putting back, files in host memory. Its limit is what any way of doing it has to move: the
untouched weights are read and the live ones written, once for each of the two, measured as a plain copy beside every
switch. Each part is measured by a function of its own, interleaved over its cases, and written when it is there.

    python -m bench.lora_costs [--device cuda] [--parts ranks,formats,layers,convolutions] [--repeats 7]
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.convolutions import convolutions_on
from bench.instruments import Clock, spread
from bench.lora_files import WRITERS, write_file
from bench.memory_limit import MemoryLimit, loras_of, weights_of
from bench.models import SIZES, random_pipeline
from bench.report import machine, table, write_result
from sdxl_worker.lora.engine import Lora, LoraEngine

RANKS = (4, 16, 32, 64, 128, 256)
SHARES = (0.1, 0.25, 0.5, 1.0)
COUNTS = (1, 2, 4)


def switches_on(pipeline: Any, cases: Mapping[str, Sequence[Path]], repeats: int) -> dict[str, Any]:
    """Merging and putting back the files of each case, in turns, each beside the plain copy of the same weights.

    `limit_ratio` is their time together against the copy's, `sent_ahead` says the same where the files were on the
    device before, and `against_first` is against the first case's time in the same round.
    """
    clock, engine = Clock(pipeline.device.type), LoraEngine(pipeline, 16 * 2**30)
    loras = {name: loras_of(engine, paths) for name, paths in cases.items()}
    limit_of: dict[str, MemoryLimit] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, own in loras.items():
        limit_of[name] = MemoryLimit(weights_of(pipeline, own), copies)
        # The first time of each makes pristine copies, and the kernel.
        with engine.applied(own):
            pass
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in cases}
    kept = True
    for _ in range(repeats):
        for name, own in loras.items():
            for what, taken in _switch(clock, engine, own).items():
                seconds[name][what].append(taken)
            kept = kept and limit_of[name].bits_are_kept()
            seconds[name]["limit_s"].append(clock.time(limit_of[name].copy_twice))
    first = next(iter(cases))
    return {
        "bits_kept": kept,
        "cases": {
            name: {
                "files_bytes": sum(parsed.data.numel() for parsed, _ in loras[name]),
                "weights": len(limit_of[name].weights),
                "moved_bytes": limit_of[name].moved_bytes,
                **_summary(seconds[name], seconds[first]),
            }
            for name in cases
        },
    }


def _switch(clock: Clock, engine: LoraEngine, loras: Sequence[Lora]) -> dict[str, float]:
    """Seconds of merging and putting back, and of merging what was sent ahead."""
    apply = functools.partial(engine.apply, loras)
    seconds = {"apply_s": clock.time(apply), "restore_s": clock.time(engine.restore)}
    with engine.sent_ahead(loras):
        seconds["sent_ahead_apply_s"] = clock.time(apply)
    engine.restore()
    return seconds


def _summary(row: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    switch = [apply + restore for apply, restore in zip(row["apply_s"], row["restore_s"], strict=True)]
    ahead = [apply + restore for apply, restore in zip(row["sent_ahead_apply_s"], row["restore_s"], strict=True)]
    of_first = [apply + restore for apply, restore in zip(first["apply_s"], first["restore_s"], strict=True)]

    def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
        return spread([one / two for one, two in zip(own, other, strict=True)])

    return {
        **{name: spread(values) for name, values in row.items()},
        "switch_s": spread(switch),
        "limit_ratio": ratio(switch, row["limit_s"]),
        "sent_ahead_limit_ratio": ratio(ahead, row["limit_s"]),
        "against_first": ratio(switch, of_first),
    }


def ranks_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One LoRA on all layers by its rank (`options.ranks`); `against_first` is against the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            str(rank): [write_file(pipeline, Path(folder) / f"{rank}.safetensors", rank=rank)]
            for rank in getattr(options, "ranks", RANKS)
        }
        return switches_on(pipeline, cases, options.repeats)


def formats_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One file of each format on all layers; `against_first` is against a LoRA of rank 32."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            name: [write_file(pipeline, Path(folder) / f"{name}.safetensors", name=name)]
            for name in getattr(options, "formats", WRITERS)
        }
        return switches_on(pipeline, cases, options.repeats)


def layers_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """LoRAs of rank 32 by their number (`options.counts`) and the share of the layers that they change, for a plot.

    `points` lists modules, LoRAs, seconds and the ratio to the limit of each case, `cases` has them by `1 x 10%`.
    """
    counts, shares = getattr(options, "counts", COUNTS), getattr(options, "shares", SHARES)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            share: [
                write_file(pipeline, Path(folder) / f"{share}_{seed}.safetensors", share=share, seed=seed)
                for seed in range(max(counts))
            ]
            for share in shares
        }
        names = {f"{count} x {share:.0%}": (count, share) for count in counts for share in shares}
        found = switches_on(
            pipeline, {name: files[share][:count] for name, (count, share) in names.items()}, options.repeats
        )
    points = [
        {
            "loras": count,
            "modules": found["cases"][name]["weights"],
            "share": share,
            "switch_s": found["cases"][name]["switch_s"],
            "limit_ratio": found["cases"][name]["limit_ratio"],
        }
        for name, (count, share) in names.items()
    ]
    return {**found, "points": points}


PARTS: dict[str, Callable[[Any, argparse.Namespace], dict[str, Any]]] = {
    "ranks": ranks_on,
    "formats": formats_on,
    "layers": layers_on,
    "convolutions": convolutions_on,
}


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of one part: a row for each case."""
    if "cases" not in results:
        return [["channels_last / contiguous", f"{results['ratio']['median']:.2f}", "", ""]]
    return [
        [
            name,
            f"{1e3 * case['switch_s']['median']:.1f}",
            f"{case['limit_ratio']['median']:.2f}",
            f"{case['against_first']['median']:.2f}",
        ]
        for name, case in results["cases"].items()
    ]


def main() -> None:
    """Parse the command line, measure part by part, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, comma-separated (default all)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds over a part's cases (default 7)")
    parser.add_argument("--model", choices=tuple(SIZES), default="", help="default: full on a GPU, narrow on the CPU")
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: torch's own)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipeline = random_pipeline(options.device, options.model)
    place = "_".join(filter(None, (options.model, options.device)))
    for part in options.parts.split(","):
        results = PARTS[part](pipeline, options)
        written = {**machine(options.device), "options": vars(options), **results}
        path = write_result(f"lora_{part}_{place}", written)
        sys.stdout.write(table([part, "switch (ms)", "/ memory limit", "/ first"], rows(results)) + f"\n{path}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
