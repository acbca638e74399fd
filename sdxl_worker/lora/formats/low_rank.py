"""LoRA, Hu et al. 2021 (arXiv 2106.09685), and LoCon, its form for convolutions, Yeh et al. 2023 (arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sdxl_worker.lora.formats.difference import Difference
from sdxl_worker.lora.formats.format import (
    BIAS,
    WEIGHT,
    Change,
    Format,
    Roles,
    Shapes,
    columns_of,
    factor,
    fit,
    fold_core,
)


@dataclass(frozen=True)
class LowRank:
    """factor * up @ down, with up (out, rank) and down (rank, in x kernel), factor = alpha / rank."""

    up: Tensor
    down: Tensor
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        return fit(self.factor * (self.up.float() @ self.down.float()), weight)


def _build(roles: Roles, alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    up, down = roles["up"], roles["down"]
    scale = factor(alpha, down.shape[0])
    if "mid" in roles:
        down = fold_core(roles["mid"], down)
    changes: dict[str, Change] = {WEIGHT: LowRank(up.flatten(1), down.flatten(1), scale)}
    if "up_bias" in roles:
        changes[BIAS] = Difference(roles["up_bias"], scale)
    return changes


def _name(modules: Sequence[Shapes]) -> str:
    kernels = {tuple(shapes["down"][2:]) for shapes in modules if "down" in shapes}
    return "LoCon" if any("mid" in shapes for shapes in modules) or kernels - {(), (1, 1)} else "LoRA"


# `[^.]+` is an adapter name that PEFT may put in.
LOW_RANK = Format(
    suffixes={
        "down": r"\.lora_down\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight|\.lora_A(?:\.[^.]+)?\.weight",
        "up": r"\.lora_up\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight|\.lora_B(?:\.[^.]+)?\.weight",
        "mid": r"\.lora_mid\.weight",
        "up_bias": r"\.lora_B(?:\.[^.]+)?\.bias",
    },
    marks=frozenset({"down", "up"}),
    build=_build,
    name=_name,
    rank=("down",),
    width=columns_of("down"),
)
