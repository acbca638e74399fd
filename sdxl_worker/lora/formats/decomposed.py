"""DoRA, Liu et al. 2024 (arXiv 2402.09353), over any other format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_worker.lora.formats.format import WEIGHT, Change, Format, Roles


@dataclass(frozen=True)
class Decomposed:
    """magnitude * (W + change) / norm(W + change) - W.

    A magnitude with one value per output row (`(out, 1, ...)`, as trainers write it, or PEFT's `(out,)`) goes with the
    row norms; LyCORIS' older `(1, in, ...)` with the norms over everything but the input axis.
    """

    inner: Change
    magnitude: Tensor

    def change(self, weight: Tensor) -> Tensor:
        merged = weight + self.inner.change(weight)
        magnitude = self.magnitude.float()
        rows = magnitude.ndim == 1 or magnitude.shape[0] == weight.shape[0]
        kept = 0 if rows else 1
        shape = [length if axis == kept else 1 for axis, length in enumerate(weight.shape)]
        axes = [axis for axis in range(weight.ndim) if axis != kept]
        norm = torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
        return magnitude.reshape(shape) * (merged / norm.clamp_min(torch.finfo(torch.float32).tiny)) - weight


def _build(roles: Roles, _alpha: float | None, inner: Change | None) -> dict[str, Change]:
    if inner is None:
        raise KeyError(WEIGHT)
    return {WEIGHT: Decomposed(inner, roles["magnitude"])}


DECOMPOSED = Format(
    suffixes={"magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?"},
    marks=frozenset({"magnitude"}),
    build=_build,
    name=lambda _modules: "DoRA",
    wraps=True,
)
