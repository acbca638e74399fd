"""Low-rank changes of many weights merged by one launch of a Triton kernel, from a table of addresses.

What a file's part of the table needs is computed once, when the file is read; a request joins these arrays, and sends
one table to the device. A merge reads each changed weight once and writes it once, and reads the factors, which are
small, once for each tile, from the cache of the device. For all 722 matrices of the UNet and the 264 of the text
encoders in float16 these are 2 x 5.8 GB, 3.5 ms at the 3.35 TB/s of an H100; putting the weights back moves as much
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdxl_worker.lora.factors import CODES, MAX_ELEMENTS, Factors, Part, matrix_shape, part_rows
from sdxl_worker.lora.formats.format import Change
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.transfers import sent

_ALL_CODES = sum(CODES.values())
_CHECKED_RANK = 40


@dataclass(frozen=True)
class Variant:
    """What the kernel is checked for: the weights' dtype, the codes of the factors' dtypes together, whether weights
    lie at multiples of 16 bytes and are multiples of 8 wide."""

    weight: torch.dtype
    factors: int
    aligned: bool


class KernelFailed(Exception):
    """The kernel gave other numbers than the formula, or has something before it that it was not made for."""


class FusedMerger:
    """Merges low-rank changes into the weights of `live`; a weight's number is its place there."""

    # 120 to 128 registers of the 65536 of a processor's for each of 256 threads: two tiles at a time, without spilling.
    SIDE, DEPTH, WARPS = 64, 32, 8

    def __init__(self, live: Mapping[Any, Tensor]):
        """Takes no memory of the device and imports no Triton before the first merge."""
        self._targets = list(live)
        self._live = list(live.values())
        self._numbers = {target: number for number, target in enumerate(self._targets)}
        self._strides = [weight.stride() for weight in self._live]
        self._shapes = np.array([matrix_shape(weight) for weight in self._live], np.int64).reshape(-1, 3)
        self._codes = np.array([CODES.get(weight.dtype, 0) for weight in self._live], np.int64)
        self._kernel: Any = None
        self._checked: set[Variant] = set()

    def factors_of(self, changes: Mapping[Any, Change], data: Tensor) -> Factors:
        """What `merge` has to know of a file with `changes`, whose tensors are views of `data` (uint8, 1-D) or else
        are not for it."""
        storage, begin = data.untyped_storage().data_ptr(), data.data_ptr()
        rows: list[tuple[int, ...]] = []
        factors, others = [], []
        for target, change in changes.items():
            number = self._numbers[target]
            if isinstance(change, LowRank) and self._fits(number, change):
                pair = (change.up, change.down)
                offsets = [tensor.data_ptr() - begin for tensor in pair]
                aligned = not any(offset % change.up.element_size() for offset in offsets)
                if aligned and all(tensor.untyped_storage().data_ptr() == storage for tensor in pair):
                    rows.append((number, *offsets, change.down.shape[0], CODES[change.up.dtype]))
                    factors.append(change.factor)
                    continue
            others.append(number)
        weights, up, down, ranks, dtypes = np.array(rows, np.int64).reshape(-1, 5).T.copy()
        return Factors(weights, up, down, ranks, np.array(factors, np.float64), dtypes, np.array(others, np.int64))

    def _fits(self, number: int, change: LowRank) -> bool:
        rows, columns, _ = (int(size) for size in self._shapes[number])
        rank = change.down.shape[0]
        return (
            tuple(change.up.shape) == (rows, rank)
            and tuple(change.down.shape) == (rank, columns)
            and change.up.dtype == change.down.dtype
            and change.up.dtype in CODES
            and change.up.is_contiguous()
            and change.down.is_contiguous()
            and max(change.up.numel(), change.down.numel()) <= MAX_ELEMENTS
        )

    def targets(self, parts: Sequence[Part], only: Collection[Any] | None = None) -> list[Any]:
        """The weights (of `only` where these are given) that `merge` does: those with low-rank changes and no other."""
        wanted = np.zeros(len(self._live), bool)
        for part in parts:
            wanted[part.factors.weights[part.acting]] = True
        for part in parts:
            wanted[part.factors.others[part.strengths[part.factors.others] != 0]] = False
        if only is not None:
            allowed = np.zeros(len(self._live), bool)
            allowed[[self._numbers[target] for target in only]] = True
            wanted &= allowed
        return [self._targets[number] for number in np.flatnonzero(wanted)]

    def merge(self, parts: Sequence[Part], pristine: Mapping[Any, Tensor]) -> None:
        """live = round(pristine + sum of strength * factor * up @ down) for the weights of `pristine`, all on one
        device, where a weight may be its own pristine value; one launch for each of their dtypes, and one more where
        addresses or widths are odd.

        Raises whatever goes wrong with the kernel, KernelFailed among it; some weights may be merged then.
        """
        numbers = np.array([self._numbers[target] for target in pristine], np.int64)
        live = [self._live[number] for number in numbers]
        addresses = np.array(
            [(weight.data_ptr(), of.data_ptr()) for weight, of in zip(live, pristine.values(), strict=True)], np.int64
        ).reshape(-1, 2)
        shapes = self._shapes_now(numbers, pristine.values())
        aligned = (addresses % 16 == 0).all(1) & (shapes[:, 1] % 8 == 0)
        groups = self._codes[numbers] * 2 + aligned
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            rows = part_rows(parts, numbers[chosen], len(self._live))
            self._launch(addresses[chosen], shapes[chosen], rows, live[chosen[0]], bool(group % 2))

    def _shapes_now(self, numbers: np.ndarray, pristine: Iterable[Tensor]) -> np.ndarray:
        """Those of `matrix_shape`: whole models change the order of their convolutions. Raises KernelFailed."""
        for number, copy in zip(numbers.tolist(), pristine, strict=True):
            weight = self._live[number]
            if (strides := weight.stride()) != self._strides[number]:
                self._strides[number], self._shapes[number] = strides, matrix_shape(weight)
            if copy.stride() != strides:
                raise KernelFailed("a weight lies in another order than its untouched copy")
        if not self._shapes[numbers].all():
            raise KernelFailed("a weight lies in memory in an order that is not known")
        return self._shapes[numbers]

    def _launch(
        self, addresses: np.ndarray, shapes: np.ndarray, parts: np.ndarray, like: Tensor, aligned: bool
    ) -> None:
        variant = Variant(like.dtype, int(np.bitwise_or.reduce(parts[:, -1])), aligned)
        if variant not in self._checked:
            self._check(variant, like.device)
            self._checked.add(variant)
        tiles = -(-shapes[:, 0] // self.SIDE) * -(-shapes[:, 1] // self.SIDE)
        ends = np.searchsorted(parts[:, 0], np.arange(len(shapes) + 1))
        # The table in int64: eight columns for a module, then five for a part (`part_rows`), then each module's tiles.
        modules = np.column_stack([addresses, shapes, np.cumsum(tiles) - tiles, ends[:-1], ends[1:]])
        host = torch.from_numpy(np.concatenate([modules.ravel(), parts[:, 1:].ravel(), tiles]))
        table = sent(host, like.device)
        total = int(tiles.sum())
        of_tile = torch.repeat_interleave(table[-len(tiles) :], output_size=total).int()
        self._run(table, of_tile, modules.size, variant)

    def _check(self, variant: Variant, device: torch.device) -> None:
        """Merge small random factors into small random weights. Raises KernelFailed; waits for the device once."""
        random = torch.Generator().manual_seed(0)
        width = 16 if variant.aligned else 15
        matrix, convolution = (torch.randn(shape, generator=random) for shape in ((70, 5 * width), (24, width, 3, 3)))
        live = {
            "matrix": matrix.to(device, variant.weight),
            "convolution": convolution.to(device, variant.weight, memory_format=torch.channels_last),
        }
        expected = {name: weight.double() for name, weight in live.items()}
        trial = type(self)(live)
        trial._kernel, trial._checked = self._jitted(), {variant}
        parts = []
        for dtype in (dtype for dtype, code in CODES.items() if code & variant.factors):
            changes, data = _random_file(live, dtype, random)
            strength = 0.7
            parts.append(Part(trial.factors_of(changes, data), data.to(device), np.full(len(live), strength)))
            for name, change in changes.items():
                product = change.up.to(device).double() @ change.down.to(device).double()
                expected[name] += strength * change.factor * product.reshape(expected[name].shape)
        trial.merge(parts, {name: weight.clone() for name, weight in live.items()})
        step = torch.finfo(variant.weight).eps
        right = [torch.isclose(live[name].double(), expected[name], step, 1e-5).all() for name in live]
        if not bool(torch.stack(right).all()):
            raise KernelFailed(f"it gave wrong numbers for {variant}")

    def _jitted(self) -> Any:
        import triton

        from sdxl_worker.lora import kernel

        if self._kernel is None:
            self._kernel = triton.jit(kernel.merge_tiles, do_not_specialize=["parts_at"])
        return self._kernel

    def _run(self, table: Tensor, of_tile: Tensor, parts_at: int, variant: Variant) -> None:
        import triton.language as tl

        # Triton launches on the current device.
        with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
            self._jitted()[(of_tile.numel(),)](
                table,
                of_tile,
                parts_at,
                WEIGHT=getattr(tl, str(variant.weight).removeprefix("torch.")),
                # One kernel for all mixtures, or each would be compiled.
                DTYPES=variant.factors if variant.factors in CODES.values() else _ALL_CODES,
                ALIGNED=variant.aligned,
                SIDE=self.SIDE,
                DEPTH=self.DEPTH,
                num_warps=self.WARPS,
                num_stages=2,
            )


def _random_file(live: Mapping[str, Tensor], dtype: torch.dtype, random: torch.Generator) -> tuple[dict, Tensor]:
    """A change of rank `_CHECKED_RANK` for each weight, and the buffer (uint8) that its factors are views of."""
    rank = _CHECKED_RANK
    shapes = [shape for weight in live.values() for shape in ((weight.shape[0], rank), (rank, weight[0].numel()))]
    sizes = [rows * columns for rows, columns in shapes]
    data = torch.randn(sum(sizes), generator=random).to(dtype)
    views = [view.view(shape) for view, shape in zip(data.split(sizes), shapes, strict=True)]
    pairs = zip(live, views[::2], views[1::2], strict=True)
    return {name: LowRank(up, down, 1 / rank) for name, up, down in pairs}, data.view(torch.uint8)
