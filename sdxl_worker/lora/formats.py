"""The formulas: from a module's LoRA tensors to the float32 change of its weight.

Every class answers `change(weight)`: the difference that scale 1.0 adds to the pristine weight, as a float32 tensor of
the weight's shape on the weight's device. The scale multiplies this change, for all formats alike (as A1111 and
ComfyUI do), so a scale of 0 is always the base model and a negative one inverts.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); LoCon, LoHa, LoKr and their Tucker forms, Yeh et al. 2023 (arXiv
2309.14859) and lycoris-lora's functional API; DoRA, Liu et al. 2024 (arXiv 2402.09353); OFT, Qiu et al. 2023 (arXiv
2306.07280); BOFT, Liu et al. 2023 (arXiv 2311.06243); GLoRA, Chavan et al. 2023 (arXiv 2306.07967).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sdxl_worker.errors import LoraIncompatible

Roles = dict[str, Tensor]


class Change(Protocol):
    """One module parameter's change; tensors may be of any float dtype and are computed with in float32."""

    def change(self, weight: Tensor) -> Tensor:
        """Float32, of `weight`'s shape; `weight` is the pristine one in float32. Raises RuntimeError on a misfit."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA and LoCon: factor * up @ down, with up (out, rank) and down (rank, in x kernel), factor = alpha / rank."""

    up: Tensor
    down: Tensor
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        return _fit(self.factor * (self.up.float() @ self.down.float()), weight)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: factor * (w1_a @ w1_b) * (w2_a @ w2_b), each product rebuilt through its Tucker core where there is one."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None
    t2: Tensor | None
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        first = _product(self.w1_a, self.w1_b, self.t1)
        return _fit(self.factor * first * _product(self.w2_a, self.w2_b, self.t2), weight)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: factor * kron(w1, w2), each whole or as a product, w2 (out, in, *kernel) for convolutions."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    t2: Tensor | None
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        w1 = self.w1[0].float() if len(self.w1) == 1 else _product(self.w1[0], self.w1[1], None)
        w2 = self.w2[0].float() if len(self.w2) == 1 else _product(self.w2[0], self.w2[1], self.t2)
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
        return _fit(self.factor * torch.kron(w1, w2.contiguous()), weight)


@dataclass(frozen=True)
class Difference:
    """The change itself, written out: `.diff` and `.diff_b`, norm differences `w_norm` and `b_norm`, LoRA biases."""

    difference: Tensor
    factor: float = 1.0

    def change(self, weight: Tensor) -> Tensor:
        return _fit(self.factor * self.difference.float(), weight)


@dataclass(frozen=True)
class Orthogonal:
    """OFT: rescale * R^T W - W per block of output rows, R the Cayley transform of blocks - blocks^T.

    `blocks` is (n, b, b); `constraint` bounds the norm of the skew matrix (alpha * out, 0 = none). BOFT's butterfly
    has blocks (stages, n, b, b) and multiplies W by R in each stage after a shuffle of its rows.
    """

    blocks: Tensor
    rescale: Tensor | None
    alpha: float

    def change(self, weight: Tensor) -> Tensor:
        rotation = self._rotation(weight.shape[0])
        turned = self._butterfly(rotation, weight) if self.blocks.ndim == 4 else self._blockwise(rotation, weight)
        if self.rescale is not None:
            turned = turned * self.rescale.float().reshape(-1, *[1] * (weight.ndim - 1))
        return _fit(turned - weight, weight)

    def _rotation(self, out: int) -> Tensor:
        blocks = self.blocks.float()
        skew = blocks - blocks.transpose(-1, -2)
        limit = self.alpha * out
        if limit > 0:
            skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1.0)
        identity = torch.eye(blocks.shape[-1], device=blocks.device).expand_as(skew)
        # (I + Q)(I - Q)^-1, and the two factors commute.
        return torch.linalg.solve(identity - skew, identity + skew)

    @staticmethod
    def _blockwise(rotation: Tensor, weight: Tensor) -> Tensor:
        blocks, size, _ = rotation.shape
        rows = weight.reshape(blocks, size, -1)
        return torch.einsum("knm,kni->kmi", rotation, rows).reshape(weight.shape)

    @staticmethod
    def _butterfly(rotation: Tensor, weight: Tensor) -> Tensor:
        rows = weight.reshape(weight.shape[0], -1)
        size = rotation.shape[-1]
        for stage, blocks in enumerate(rotation):
            half = 2**stage * (size // 2)
            shuffled = rows.unflatten(0, (-1, 2, half)).transpose(1, 2).reshape(-1, size, rows.shape[1])
            turned = torch.einsum("bij,bjn->bin", blocks, shuffled).flatten(0, 1)
            rows = turned.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return rows.reshape(weight.shape)


@dataclass(frozen=True)
class Generalized:
    """GLoRA: factor * (W @ a1 @ a2 + b1 @ b2), the first product along W's input axis."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    factor: float

    def change(self, weight: Tensor) -> Tensor:
        turn = self.a1.flatten(1).float() @ self.a2.flatten(1).float()
        turned = torch.einsum("oi...,ij->oj...", weight, turn)
        return _fit(self.factor * (turned + _fit(_product(self.b1, self.b2, None), weight)), weight)


@dataclass(frozen=True)
class Decomposed:
    """DoRA over any other format: magnitude * (W + change) / norm(W + change) - W.

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


def _product(left: Tensor, right: Tensor, core: Tensor | None) -> Tensor:
    """left (out, r) @ right (r, in, *kernel), or with a Tucker core (r, r, *kernel): left (r, out), right (r, in)."""
    left, right = left.float(), right.float()
    if core is not None:
        return torch.einsum("ij...,ip,jr->pr...", core.float(), left, right)
    return (left.flatten(1) @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def _fit(change: Tensor, weight: Tensor) -> Tensor:
    if change.numel() != weight.numel() or (change.ndim and change.shape[0] != weight.shape[0]):
        raise RuntimeError(f"a change of shape {tuple(change.shape)} for a weight of shape {tuple(weight.shape)}")
    return change.reshape(weight.shape)


def _low_rank(roles: Roles, alpha: float | None) -> Change:
    up, down, core = roles.pop("up"), roles.pop("down"), roles.pop("mid", None)
    if core is not None:
        down = _fold_core(core, down)
    return LowRank(up.flatten(1), down.flatten(1), _factor(alpha, down.shape[0]))


def _hadamard(roles: Roles, alpha: float | None) -> Change:
    w1_a, w1_b, w2_a, w2_b = (roles.pop(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    t1, t2 = roles.pop("hada_t1", None), roles.pop("hada_t2", None)
    return Hadamard(w1_a, w1_b, w2_a, w2_b, t1, t2, _factor(alpha, w1_b.shape[0]))


def _kronecker(roles: Roles, alpha: float | None) -> Change:
    def part(name: str) -> tuple[Tensor, ...]:
        if name in roles:
            return (roles.pop(name),)
        return roles.pop(f"{name}_a"), roles.pop(f"{name}_b")

    w1, w2, core = part("lokr_w1"), part("lokr_w2"), roles.pop("lokr_t2", None)
    # With both parts whole there is no rank, and trainers write an alpha that means nothing.
    rank = next((pair[1].shape[0] for pair in (w2, w1) if len(pair) == 2), None)
    return Kronecker(w1, w2, core, _factor(alpha, rank) if rank else 1.0)


def _orthogonal(roles: Roles, alpha: float | None) -> Change:
    return Orthogonal(roles.pop("oft_blocks"), roles.pop("rescale", None), alpha or 0.0)


def _generalized(roles: Roles, alpha: float | None) -> Change:
    a1, a2, b1, b2 = (roles.pop(name) for name in ("a1", "a2", "b1", "b2"))
    if (core := roles.pop("bm", None)) is not None:
        b2 = _fold_core(core, b2)
    return Generalized(a1, a2, b1, b2, _factor(alpha, a2.shape[0]))


def _fold_core(core: Tensor, down: Tensor) -> Tensor:
    """With its Tucker core (r, r, *kernel) folded in, `down` (r, in) is that of an ordinary low-rank convolution."""
    return torch.einsum("mn...,nj->mj...", core.float(), down.flatten(1).float())


def _factor(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


# The first entry whose tensor is there decides; w_norm is a difference like any other.
_WEIGHT_FORMATS: tuple[tuple[str, Callable[[Roles, float | None], Change]], ...] = (
    ("down", _low_rank),
    ("up", _low_rank),
    ("hada_w1_a", _hadamard),
    ("lokr_w1", _kronecker),
    ("lokr_w1_a", _kronecker),
    ("oft_blocks", _orthogonal),
    ("a1", _generalized),
    ("diff", lambda roles, _alpha: Difference(roles.pop("diff"))),
    ("w_norm", lambda roles, _alpha: Difference(roles.pop("w_norm"))),
)


def map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a change in which `move` has replaced every tensor."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(part, move) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: map_tensors(getattr(value, item.name), move) for item in fields(value)})
    return value


def build_changes(module: str, tensors: Mapping[str, Tensor], default_alpha: float | None = None) -> dict[str, Change]:
    """The changes of one module's `weight` and `bias` from its tensors by role.

    `default_alpha` stands in for a missing `alpha` tensor (PEFT keeps alpha in its metadata). Raises LoraIncompatible,
    naming the module, when half of a pair is missing or a tensor is left over.
    """
    roles = dict(tensors)
    alpha_tensor = roles.pop("alpha", None)
    alpha = default_alpha if alpha_tensor is None else float(alpha_tensor.flatten()[0])
    changes: dict[str, Change] = {}
    try:
        for role, make in _WEIGHT_FORMATS:
            if role in roles:
                changes["weight"] = make(roles, alpha)
                break
        if "magnitude" in roles:
            changes["weight"] = Decomposed(changes["weight"], roles.pop("magnitude"))
    except KeyError as missing:
        raise LoraIncompatible(f"the tensor {missing.args[0]!r} of the LoRA module {module!r} is missing") from None
    for role in ("diff_b", "b_norm", "up_bias"):
        if role in roles:
            rank = tensors["down"].shape[0] if role == "up_bias" and "down" in tensors else 1
            changes["bias"] = Difference(roles.pop(role), _factor(alpha, rank) if role == "up_bias" else 1.0)
    if roles:
        raise LoraIncompatible(
            f"the LoRA module {module!r} has tensors that do not go together: {', '.join(sorted(tensors))}"
        )
    return changes
