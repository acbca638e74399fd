"""What moving the weights that LoRAs change costs: the limit of any way to merge them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lora_files import SCALE
from sdxl_worker.lora.engine import Lora, LoraEngine, targets_of
from sdxl_worker.request import LoraScale


class MemoryLimit:
    """Weights that LoRAs change, with copies that say what moving them costs, and whether they keep their bits."""

    def __init__(self, weights: Sequence[Tensor], copies: dict[int, Tensor] | None = None) -> None:
        """`copies` by the weights' addresses: where they are given, they are shared with others and added to."""
        copies = {} if copies is None else copies
        self.weights = list(weights)
        self._before = [_copy_of(weight, copies) for weight in self.weights]

    @property
    def moved_bytes(self) -> int:
        """What one `copy_twice` reads and writes."""
        return 4 * sum(weight.numel() * weight.element_size() for weight in self.weights)

    @torch.no_grad()
    def copy_twice(self) -> None:
        """Read the untouched weights and write the live ones, as a merge has to, and once more, as putting back has."""
        for _ in range(2):
            torch._foreach_copy_(self.weights, self._before)

    def bits_are_kept(self) -> bool:
        """True while the weights are what they were."""
        return all(torch.equal(live, before) for live, before in zip(self.weights, self._before, strict=True))


def _copy_of(weight: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if weight.data_ptr() not in copies:
        copies[weight.data_ptr()] = weight.detach().clone()
    return copies[weight.data_ptr()]


def loras_of(engine: LoraEngine, paths: Sequence[Path]) -> list[Lora]:
    """The files as `LoraEngine.apply` takes them; those that were read before come from host memory."""
    return [(engine.read(path), LoraScale.uniform(SCALE)) for path in paths]


def weights_of(pipeline: Any, loras: Sequence[Lora]) -> list[Tensor]:
    """The weights that the LoRAs change, each once."""
    targets = dict.fromkeys(target for lora in loras for target in targets_of(lora))
    return [getattr(pipeline, t.component).get_parameter(f"{t.module}.{t.parameter}") for t in targets]
