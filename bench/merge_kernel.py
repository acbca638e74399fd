"""The kernel that merges LoRAs against copying the same weights once, against torch weight by weight, and by tile.

Files are on the device beforehand, so that merging alone is measured: `merge_s`, of which `host_s` is the host's.
Rows are measured in turns. Without a GPU there is only torch's row.

    python -m bench.merge_kernel [--repeats 7] [--counts 1,2,4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench.instruments import Clock, spread
from bench.lora_files import write_loras
from bench.memory_limit import MemoryLimit, loras_of, weights_of
from bench.models import SIZES, random_pipeline
from bench.report import machine, table, write_result
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.fused import FusedMerger

COUNTS = (1, 2, 4)
TORCH, KERNEL = "torch, weight by weight", "kernel"
# Side of a tile, how much of the rank at a time, warps.
TILES = ((64, 32, 4), (64, 16, 8), (64, 64, 8), (32, 32, 4), (128, 32, 8))


def rows_of(engine: LoraEngine) -> Mapping[str, FusedMerger | None]:
    """What merges, by name; all of them use the engine's one set of untouched weights."""
    rows: dict[str, FusedMerger | None] = {TORCH: None}
    if engine._fused is not None:
        rows[KERNEL] = engine._fused
        for side, depth, warps in TILES:
            tiles = type("Tiles", (type(engine._fused),), {"SIDE": side, "DEPTH": depth, "WARPS": warps})
            rows[f"{side} x {side}, {depth} at a time, {warps} warps"] = tiles(engine._live)
    return MappingProxyType(rows)


def run_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Each row for each number of LoRAs, on a ready pipeline, which keeps its weights."""
    clock, engine = Clock(pipeline.device.type), LoraEngine(pipeline, 16 * 2**30)
    rows, counts, kept = rows_of(engine), [int(count) for count in options.counts], True
    seconds: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    failed: dict[str, str] = {}
    first: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        loras = loras_of(engine, write_loras(pipeline, Path(folder), max(counts)))
    limit = MemoryLimit(weights_of(pipeline, loras))
    # The first time compiles, checks, and copies the weights.
    for turn in range(options.repeats + 1):
        for name, fused in rows.items():
            for count in counts if name not in failed else ():
                engine._merger._fused = fused
                own = seconds[name, count] if turn else first
                with engine.sent_ahead(loras[:count]):
                    clock.wait()
                    begun = time.perf_counter()
                    engine.apply(loras[:count])
                    own["host_s"].append(time.perf_counter() - begun)
                    clock.wait()
                    own["merge_s"].append(time.perf_counter() - begun)
                own["restore_s"].append(clock.time(engine.restore))
                # Reads and writes each weight twice.
                own["copy_s"].append(clock.time(limit.copy_twice) / 2)
                if engine._merger._fused is not fused:
                    failed[name] = "torch had to take over: the log says why"
            kept = kept and limit.bits_are_kept()
    return {
        "bits_kept": kept,
        "weights": len(limit.weights),
        "bytes": limit.moved_bytes // 4,
        "cases": {name: _by_count(name, seconds) for name in rows if name not in failed},
        "failed": failed,
    }


def _by_count(row: str, seconds: Mapping[tuple[str, int], Mapping[str, list[float]]]) -> dict[str, dict[str, Any]]:
    cases = {}
    for count, taken in ((count, taken) for (name, count), taken in seconds.items() if name == row):
        ratio = spread([merge / copy for merge, copy in zip(taken["merge_s"], taken["copy_s"], strict=True)])
        cases[str(count)] = {"copy_ratio": ratio, **{key: spread(each) for key, each in taken.items()}}
    return cases


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=tuple(SIZES), default="", help="default: full on a GPU, narrow on the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--counts", default=COUNTS, type=lambda text: text.split(","), help="LoRAs (default 1,2,4)")
    options = parser.parse_args()
    found = run_on(random_pipeline(options.device, options.model), options)
    lines = [
        [name, count, *(f"{1e3 * case[key]['median']:.2f}" for key in ("merge_s", "host_s", "restore_s", "copy_s"))]
        for name, cases in found["cases"].items()
        for count, case in cases.items()
    ]
    path = write_result(
        f"merge_kernel_{options.device}", {**machine(options.device), "options": vars(options), **found}
    )
    heads = ["", "LoRAs", "merge (ms)", "of it host", "restore", "one copy"]
    sys.stdout.write(table(heads, lines) + "".join(f"\n{name}: {why}" for name, why in found["failed"].items()))
    sys.stdout.write(f"\n{path}\n")


if __name__ == "__main__":
    main()
