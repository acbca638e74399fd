"""LoKr, Yeh et al. 2023 (arXiv 2309.14859), with its Tucker form; as lycoris-lora's functional API has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_worker.lora.formats.format import WEIGHT, Change, Format, Roles, Shapes, as_written, factor, fit, product


@dataclass(frozen=True)
class Kronecker:
    """factor * kron(w1, w2), each whole or as a product, w2 (out, in, *kernel) for convolutions."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    t2: Tensor | None
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        w1 = self.w1[0].float() if len(self.w1) == 1 else product(self.w1[0], self.w1[1])
        w2 = self.w2[0].float() if len(self.w2) == 1 else product(self.w2[0], self.w2[1], self.t2)
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
        return fit(self.factor * torch.kron(w1, w2.contiguous()), weight)


def _part(roles: Roles, name: str) -> tuple[Tensor, ...]:
    return (roles[name],) if name in roles else (roles[f"{name}_a"], roles[f"{name}_b"])


def _build(roles: Roles, alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    w1, w2 = _part(roles, "lokr_w1"), _part(roles, "lokr_w2")
    # With both parts whole there is no rank, and trainers write an alpha that means nothing.
    rank = next((pair[1].shape[0] for pair in (w2, w1) if len(pair) == 2), None)
    return {WEIGHT: Kronecker(w1, w2, roles.get("lokr_t2"), factor(alpha, rank) if rank else 1.0)}


def _width(shapes: Shapes) -> int | None:
    halves = [shapes.get(f"lokr_{part}", shapes.get(f"lokr_{part}_b", ())) for part in ("w1", "w2")]
    return halves[0][1] * halves[1][1] if all(len(half) > 1 for half in halves) else None


KRONECKER = Format(
    suffixes=as_written("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    marks=frozenset({"lokr_w1", "lokr_w1_a"}),
    build=_build,
    name=lambda _modules: "LoKr",
    rank=("lokr_w2_b", "lokr_w1_b"),
    width=_width,
)
