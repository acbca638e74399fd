"""What a LoRA format is to the worker, and the arithmetic that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Roles = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]
WEIGHT, BIAS = "weight", "bias"


class Change(Protocol):
    """One module parameter's change; tensors may be of any float dtype and are computed with in float32."""

    def change(self, weight: Tensor) -> Tensor:
        """Float32, of `weight`'s shape; `weight` is the pristine one in float32. Raises RuntimeError on a misfit."""
        ...


@dataclass(frozen=True)
class Format:
    """All that the worker knows of one way to write a change down.

    `suffixes`: role -> regular expression for what follows the module in a tensor's name, from a dot or `_lora.` on.
    `marks`: the roles of which a module of this format has at least one. `build(roles, alpha, inner)` makes the change
    of each parameter ("weight", "bias") from the module's tensors of this format, of which a missing one is a KeyError;
    `inner` is the weight's change by the module's other formats, which only a format that `wraps` may replace.
    `name(modules)` is what people call it, told from each module's shapes by role. `rank` lists the roles whose first
    axis is the rank, `width` gives the input width by a module's shapes: None where they do not say.
    """

    suffixes: Mapping[str, str]
    marks: frozenset[str]
    build: Callable[[Roles, float | None, Change | None], Mapping[str, Change]]
    name: Callable[[Sequence[Shapes]], str]
    rank: tuple[str, ...] = ()
    width: Callable[[Shapes], int | None] = lambda _shapes: None
    wraps: bool = False


def columns_of(role: str) -> Callable[[Shapes], int | None]:
    """The `width` of a format whose tensor `role` has the module's input as its second axis."""
    return lambda shapes: shapes[role][1] if len(shapes.get(role, ())) > 1 else None


def as_written(*roles: str, end: str = "") -> dict[str, str]:
    """`suffixes` of roles that are called in the file what they are called here, followed by `end`."""
    return {role: rf"\.{role}{end}" for role in roles}


def factor(alpha: float | None, rank: int) -> float:
    """alpha / rank, or 1 where the file says no alpha."""
    return 1.0 if alpha is None else alpha / rank


def product(left: Tensor, right: Tensor, core: Tensor | None = None) -> Tensor:
    """left (out, r) @ right (r, in, *kernel), or with a Tucker core (r, r, *kernel): left (r, out), right (r, in)."""
    left, right = left.float(), right.float()
    if core is not None:
        return torch.einsum("ij...,ip,jr->pr...", core.float(), left, right)
    return (left.flatten(1) @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def fold_core(core: Tensor, down: Tensor) -> Tensor:
    """With its Tucker core (r, r, *kernel) folded in, `down` (r, in) is that of an ordinary low-rank convolution."""
    return torch.einsum("mn...,nj->mj...", core.float(), down.flatten(1).float())


def tensors_of(change: Change) -> list[Tensor]:
    """Every tensor that a change holds."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(change, note)
    return found


def map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a change in which `move` has replaced every tensor."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(part, move) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: map_tensors(getattr(value, item.name), move) for item in fields(value)})
    return value


def fit(change: Tensor, weight: Tensor) -> Tensor:
    """`change` in the shape of `weight`; raises RuntimeError when it is not one of that weight."""
    if change.numel() != weight.numel() or (change.ndim and change.shape[0] != weight.shape[0]):
        raise RuntimeError(f"a change of shape {tuple(change.shape)} for a weight of shape {tuple(weight.shape)}")
    return change.reshape(weight.shape)
