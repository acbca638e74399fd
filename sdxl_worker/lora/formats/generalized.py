"""GLoRA, Chavan et al. 2023 (arXiv 2306.07967), as lycoris-lora has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_worker.lora.formats.format import (
    WEIGHT,
    Change,
    Format,
    Roles,
    as_written,
    columns_of,
    factor,
    fit,
    fold_core,
    product,
)


@dataclass(frozen=True)
class Generalized:
    """factor * (W @ a1 @ a2 + b1 @ b2), the first product along W's input axis."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        a1, a2 = self.a1.flatten(1).float(), self.a2.flatten(1).float()
        # From the left, W first: a1 @ a2 alone is in x in, several times the weight where that is wide.
        turned = torch.einsum("or...,rj->oj...", torch.einsum("oi...,ir->or...", weight, a1), a2)
        return fit(self.factor * (turned + fit(product(self.b1, self.b2), weight)), weight)


def _build(roles: Roles, alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    a1, a2, b1, b2 = (roles[name] for name in ("a1", "a2", "b1", "b2"))
    if "bm" in roles:
        b2 = fold_core(roles["bm"], b2)
    return {WEIGHT: Generalized(a1, a2, b1, b2, factor(alpha, a2.shape[0]))}


GENERALIZED = Format(
    suffixes=as_written("a1", "a2", "b1", "b2", "bm", end=r"\.weight"),
    marks=frozenset({"a1"}),
    build=_build,
    name=lambda _modules: "GLoRA",
    rank=("a2",),
    width=columns_of("a2"),
)
