"""The change itself, written out: LyCORIS' `full` and its norm training, and the biases of other formats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdxl_worker.lora.formats.format import BIAS, WEIGHT, Change, Format, Roles, as_written, columns_of, fit


@dataclass(frozen=True)
class Difference:
    """factor * difference, of the parameter's own shape."""

    difference: Tensor
    factor: float = 1.0

    def change(self, weight: Tensor) -> Tensor:
        return fit(self.factor * self.difference.float(), weight)


def _build(roles: Roles, _alpha: float | None, _inner: Change | None) -> dict[str, Change]:
    parameters = {"diff": WEIGHT, "w_norm": WEIGHT, "diff_b": BIAS, "b_norm": BIAS}
    return {parameters[role]: Difference(tensor) for role, tensor in roles.items()}


DIFFERENCE = Format(
    suffixes=as_written("diff", "diff_b"),
    marks=frozenset({"diff", "diff_b"}),
    build=_build,
    name=lambda modules: "full difference" if any("diff" in shapes for shapes in modules) else "",
    width=columns_of("diff"),
)
NORM_DIFFERENCE = Format(
    suffixes=as_written("w_norm", "b_norm"),
    marks=frozenset({"w_norm", "b_norm"}),
    build=_build,
    name=lambda modules: "norm difference" if any("w_norm" in shapes for shapes in modules) else "",
)
