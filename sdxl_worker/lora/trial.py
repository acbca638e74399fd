"""A module's changes from its tensors, tried on shapes alone before a number is touched.

The tensors are a stranger's: any shape may stand there. On torch's meta device a formula checks its shapes and
computes nothing, so what passes there can be built and applied in the memory that it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_worker.errors import LoraIncompatible
from sdxl_worker.lora.formats import ALPHA, build_changes
from sdxl_worker.lora.formats.format import BIAS, WEIGHT, Change
from sdxl_worker.memory import is_out_of_memory
from sdxl_worker.text import clean_text

# Elements: what any formula may use, so that small modules may have a rank beyond their own size.
_FLOOR = 2**20


class Trial:
    """Tries each kind of module once: a file has about a thousand modules of some thirty kinds."""

    def __init__(self) -> None:
        self._fitting: set[Any] = set()

    def changes(
        self, written: str, tensors: Mapping[str, Tensor], alpha: float | None, owner: Any
    ) -> dict[str, Change]:
        """The changes of the parameters of `owner`, the resident module, by the tensors (by role) of `written`.

        `alpha` counts where there is no such tensor. Raises LoraIncompatible, naming the module, whatever is wrong with
        the tensors.
        """
        try:
            own = {role: tensor for role, tensor in tensors.items() if role != ALPHA}
            if ALPHA in tensors:
                alpha = float(tensors[ALPHA].reshape(()))
            self._try(written, own, alpha, owner)
            return build_changes(written, own, alpha)
        except Exception as error:
            if isinstance(error, LoraIncompatible) or is_out_of_memory(error):
                raise
            # torch, asked for shapes that nobody foresaw, raises what it likes.
            size = tuple(owner.weight.shape)
            raise LoraIncompatible(
                f"the tensors of {quoted(written)} do not fit the resident weight of shape {size}"
            ) from error

    def _try(self, written: str, tensors: Mapping[str, Tensor], alpha: float | None, owner: Any) -> None:
        bias = getattr(owner, BIAS, None)
        shapes = {WEIGHT: owner.weight.shape, BIAS: None if bias is None else bias.shape}
        kind = (*shapes.values(), alpha is None, *sorted((role, tensor.shape) for role, tensor in tensors.items()))
        if kind in self._fitting:
            return
        on_meta = {role: tensor.to("meta") for role, tensor in tensors.items()}
        largest = max(tensor.numel() for tensor in (*tensors.values(), owner.weight))
        with _Bounded(max(2 * largest, _FLOOR)):
            for parameter, change in build_changes(written, on_meta, None if alpha is None else 1.0).items():
                shape = shapes[parameter]
                if shape is None:
                    raise LoraIncompatible(f"{quoted(written)} changes a {parameter} that the module does not have")
                change.change(torch.empty(shape, device="meta"))
        self._fitting.add(kind)


class _Bounded(TorchDispatchMode):
    """Inside, no operation may give a tensor of more than `limit` elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() > self._limit:
                raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)}, far larger than file and module")
        return result


def quoted(name: str) -> str:
    """A name from a file, fit to be shown."""
    return repr(clean_text(name))
