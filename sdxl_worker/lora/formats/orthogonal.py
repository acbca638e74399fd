"""OFT, Qiu et al. 2023 (arXiv 2306.07280), and BOFT, Liu et al. 2023 (arXiv 2311.06243), as lycoris-lora has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_worker.lora.formats.format import WEIGHT, Change, Format, Roles, Shapes, as_written, fit


@dataclass(frozen=True)
class Orthogonal:
    """rescale * R^T W - W per block of output rows, R the Cayley transform of blocks - blocks^T.

    `blocks` is (n, b, b); `alpha` bounds the norm of the skew matrix (times out, 0 = no bound). BOFT's butterfly has
    blocks (stages, n, b, b) and multiplies W by R in each stage after a shuffle of its rows.
    """

    blocks: Tensor
    rescale: Tensor | None
    alpha: float

    def change(self, weight: Tensor) -> Tensor:
        rotation = self._rotation(weight.shape[0])
        turned = self._butterfly(rotation, weight) if self.blocks.ndim == 4 else self._blockwise(rotation, weight)
        if self.rescale is not None:
            turned = turned * self.rescale.float().reshape(-1, *[1] * (weight.ndim - 1))
        return fit(turned - weight, weight)

    def _rotation(self, out: int) -> Tensor:
        blocks = self.blocks.float()
        skew = blocks - blocks.transpose(-1, -2)
        limit = self.alpha * out
        if limit > 0:
            skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1.0)
        identity = torch.eye(blocks.shape[-1], device=blocks.device).expand_as(skew)
        # (I + Q)(I - Q)^-1, and the two factors commute. I - Q has an inverse for every skew Q: to check that there is
        # one would make the host wait for the device.
        return torch.linalg.solve_ex(identity - skew, identity + skew).result

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


def _build(roles: Roles, alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    return {WEIGHT: Orthogonal(roles["oft_blocks"], roles.get("rescale"), alpha or 0.0)}


def _name(modules: Sequence[Shapes]) -> str:
    return "BOFT" if any(len(shapes["oft_blocks"]) == 4 for shapes in modules) else "OFT"


ORTHOGONAL = Format(
    suffixes=as_written("oft_blocks", "rescale"), marks=frozenset({"oft_blocks"}), build=_build, name=_name
)
