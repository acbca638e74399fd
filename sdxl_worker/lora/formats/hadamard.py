"""LoHa, Yeh et al. 2023 (arXiv 2309.14859), with its Tucker form; as lycoris-lora's functional API has it."""

from __future__ import annotations

from dataclasses import dataclass

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
    product,
)


@dataclass(frozen=True)
class Hadamard:
    """factor * (w1_a @ w1_b) * (w2_a @ w2_b), each product rebuilt through its Tucker core where there is one."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None
    t2: Tensor | None
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        first = product(self.w1_a, self.w1_b, self.t1)
        return fit(self.factor * first * product(self.w2_a, self.w2_b, self.t2), weight)


def _build(roles: Roles, alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    w1_a, w1_b, w2_a, w2_b = (roles[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    cores = roles.get("hada_t1"), roles.get("hada_t2")
    return {WEIGHT: Hadamard(w1_a, w1_b, w2_a, w2_b, *cores, factor(alpha, w1_b.shape[0]))}


HADAMARD = Format(
    suffixes=as_written("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    marks=frozenset({"hada_w1_a"}),
    build=_build,
    name=lambda _modules: "LoHa",
    rank=("hada_w1_b",),
    width=columns_of("hada_w1_b"),
)
