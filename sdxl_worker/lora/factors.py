"""What the kernel that merges LoRAs has to know of files and weights: `fused` makes one table for the device of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The kernel knows dtypes of factors by one bit each.
CODES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 4}
# The kernel counts elements in int32.
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Factors:
    """One file's low-rank changes, an element each: weight number, offsets of `up` and `down` in its data (bytes),
    rank, factor, dtype code; and the numbers of the weights that it changes in any other way."""

    weights: np.ndarray
    up: np.ndarray
    down: np.ndarray
    ranks: np.ndarray
    factors: np.ndarray
    dtypes: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Part:
    """A file on the device: `data` holds its bytes, `strengths` (float64) one number for each weight of the model."""

    factors: Factors
    data: Tensor
    strengths: np.ndarray

    @property
    def acting(self) -> np.ndarray:
        """Which of the low-rank changes have a strength other than zero (bool)."""
        return self.strengths[self.factors.weights] != 0


def matrix_shape(weight: Tensor) -> tuple[int, int, int]:
    """Rows, columns, and taps where columns stand by tap first; zeros for what the kernel leaves alone."""
    if weight.ndim < 2 or weight.dtype not in CODES or not 0 < weight.numel() <= MAX_ELEMENTS:
        return 0, 0, 1
    rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
    if weight.is_contiguous():
        return rows, columns, 1
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return rows, columns, weight.shape[2] * weight.shape[3]
    return 0, 0, 1


def part_rows(parts: Sequence[Part], numbers: np.ndarray, count: int) -> np.ndarray:
    """The parts' rows of the table behind the place of their weight in `numbers`, sorted by it; `count`: of weights.

    Addresses of `up` and `down`, rank, the bits of the float32 strength in the lower half, dtype code.
    """
    places = np.full(count, -1)
    places[numbers] = np.arange(len(numbers))
    rows = [np.zeros((0, 6), np.int64)]
    for part in parts:
        found, begin = part.factors, part.data.data_ptr()
        strengths = (part.strengths[found.weights] * found.factors).astype(np.float32).view(np.int32)
        of_part = places[found.weights]
        columns = (of_part, found.up + begin, found.down + begin, found.ranks, strengths, found.dtypes)
        rows.append(np.column_stack(columns)[part.acting & (of_part >= 0)])
    joined = np.concatenate(rows)
    return joined[np.argsort(joined[:, 0], kind="stable")]
