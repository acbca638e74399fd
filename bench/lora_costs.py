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
from torch import Tensor

from bench.instruments import Clock, spread
from bench.lora_files import SCALE, WRITERS, write_file
from bench.models import SIZES, random_pipeline
from bench.report import machine, table, write_result
from sdxl_worker.lora.engine import Lora, LoraEngine, targets_of
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.lora.merge import Target, WeightMerger
from sdxl_worker.request import LoraScale

RANKS = (4, 16, 32, 64, 128, 256)
SHARES = (0.1, 0.25, 0.5, 1.0)
COUNTS = (1, 2, 4)
# Four of the UNet's 3 x 3 convolutions at full size, and how many columns and rows of them change.
CONVOLUTIONS, CONVOLUTION_SHAPE, CONVOLUTION_RANK = 4, (640, 640, 3, 3), 32


class MemoryLimit:
    """Weights that LoRAs change, with copies that say what moving them costs, and whether they keep their bits."""

    def __init__(self, weights: Sequence[Tensor], copies: dict[int, Tensor] | None = None) -> None:
        """`copies` by the weights' addresses: where they are given, they are shared with others and added to."""
        copies = {} if copies is None else copies
        self.weights = list(weights)
        self._before = [_copy_of(weight, copies) for weight in self.weights]

    @property
    def moved_bytes(self) -> int:
        """What one `copy_twice` reads and writes."""
        return 4 * sum(weight.numel() * weight.element_size() for weight in self.weights)

    @torch.no_grad()
    def copy_twice(self) -> None:
        """Read the untouched weights and write the live ones, as a merge has to, and once more, as putting back has."""
        for _ in range(2):
            torch._foreach_copy_(self.weights, self._before)

    def bits_are_kept(self) -> bool:
        """True while the weights are what they were."""
        return all(torch.equal(live, before) for live, before in zip(self.weights, self._before, strict=True))


def _copy_of(weight: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if weight.data_ptr() not in copies:
        copies[weight.data_ptr()] = weight.detach().clone()
    return copies[weight.data_ptr()]


def loras_of(engine: LoraEngine, paths: Sequence[Path]) -> list[Lora]:
    """The files as `LoraEngine.apply` takes them; those that were read before come from host memory."""
    return [(engine.read(path), LoraScale.uniform(SCALE)) for path in paths]


def weights_of(pipeline: Any, loras: Sequence[Lora]) -> list[Tensor]:
    """The weights that the LoRAs change, each once."""
    targets = dict.fromkeys(target for lora in loras for target in targets_of(lora))
    return [getattr(pipeline, t.component).get_parameter(f"{t.module}.{t.parameter}") for t in targets]


def switches_on(pipeline: Any, cases: Mapping[str, Sequence[Path]], repeats: int) -> dict[str, Any]:
    """Merging and putting back the files of each case, in turns, each beside the plain copy of the same weights.

    `limit_ratio` is their time together against the copy's, `sent_ahead` says the same where the files were on the
    device before, and `against_first` is against the first case's time in the same round.
    """
    clock, engine = Clock(pipeline.device.type), LoraEngine(pipeline, 16 * 2**30)
    loras = {name: loras_of(engine, paths) for name, paths in cases.items()}
    limit_of: dict[str, MemoryLimit] = {}
    copies: dict[int, Tensor] = {}
    for name, own in loras.items():
        limit_of[name] = MemoryLimit(weights_of(pipeline, own), copies)
        # The first time of each makes pristine copies, and the kernel.
        with engine.applied(own):
            pass
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in cases}
    kept = True
    for _ in range(repeats):
        for name, own in loras.items():
            row, limit = seconds[name], limit_of[name]
            row["apply_s"].append(clock.time(functools.partial(engine.apply, own)))
            row["restore_s"].append(clock.time(engine.restore))
            with engine.sent_ahead(own):
                row["sent_ahead_apply_s"].append(clock.time(functools.partial(engine.apply, own)))
            engine.restore()
            kept = kept and limit.bits_are_kept()
            row["limit_s"].append(clock.time(limit.copy_twice))
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


def convolutions_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Merging into channels_last convolutions against contiguous ones, by torch's own operations, in turns."""
    clock, device, dtype = Clock(pipeline.device.type), pipeline.device, pipeline.unet.dtype
    shape = tuple(getattr(options, "convolution", CONVOLUTION_SHAPE))
    random = torch.Generator().manual_seed(0)
    down = torch.randn(CONVOLUTION_RANK, shape[1] * shape[2] * shape[3], generator=random).half().to(device)
    up = (0.02 * torch.randn(shape[0], CONVOLUTION_RANK, generator=random)).half().to(device)
    targets = [Target("unet", str(index), "weight") for index in range(CONVOLUTIONS)]
    changes = {target: [(LowRank(up, down, 0.5), SCALE)] for target in targets}

    def merger(order: torch.memory_format) -> WeightMerger:
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        return WeightMerger(
            {target: weight.to(device, dtype, copy=True).contiguous(memory_format=order) for target in targets}
        )

    def seconds(one: WeightMerger) -> float:
        taken = clock.time(lambda: one.update(changes))
        one.restore()
        return taken

    orders, pairs = (torch.channels_last, torch.contiguous_format), []
    for turn in range(options.repeats):
        # New ones each time, and each order first as often: where memory lies is worth more than what is measured.
        mergers = {order: merger(order) for order in (orders, orders[::-1])[turn % 2]}
        for one in mergers.values():
            seconds(one)
        taken = {order: seconds(one) for order, one in mergers.items()}
        pairs.append([taken[order] for order in orders])
    return {
        "weights": f"{CONVOLUTIONS} of {' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}",
        "rank": CONVOLUTION_RANK,
        "channels_last_s": spread([last for last, _ in pairs]),
        "contiguous_s": spread([plain for _, plain in pairs]),
        "ratio": spread([last / plain for last, plain in pairs]),
    }


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
