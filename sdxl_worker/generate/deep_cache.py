"""DeepCache: at some steps only the UNet's outermost blocks run, over what the blocks inside gave at an earlier one.

Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", https://arxiv.org/abs/2312.00858, with its
uniform interval. The first block down and the last block up always run: in SDXL these are the two without attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class DeepCache:
    """Whether a call of the UNet runs its deep blocks, and what they gave when they last ran."""

    def __init__(self, every: int) -> None:
        """The steps that run them are each `every`-th and the last one."""
        self._every = every
        self._is_whole, self._is_last = True, False
        self._kept: dict[nn.Module, tuple[Any, Any]] = {}

    def begin_step(self, step: int, steps: int, *, anew: bool = False) -> None:
        """The calls to come are of that step, counted from 0, of so many; `anew`: the weights have changed."""
        self._is_last = step == steps - 1
        self._is_whole = anew or self._is_last or step % self._every == 0
        if self._is_whole:
            self._kept.clear()

    @contextlib.contextmanager
    def on(self, unet: Any) -> Iterator[None]:
        """Inside, a UNet2DConditionModel's deep blocks run only when it is time for it; it begins with its first step.

        Their forward method is swapped, on the modules, so that weights, hooks and compiled parts stay what they are.
        What was there before is back afterwards, whatever happens, and nothing is kept.
        """
        before = [(block, vars(block).get("forward")) for block in deep_blocks(unet)]
        try:
            for block, _ in before:
                block.forward = self._in_place_of(block)
            yield
        finally:
            for block, forward in before:
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward
            self._kept.clear()

    def _in_place_of(self, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run_or_recall(*args: Any, **keywords: Any) -> Any:
            shape = (args[0] if args else keywords["hidden_states"]).shape
            of_shape, kept = self._kept.get(block, (None, None))
            # Without guidance there are fewer rows than before.
            if self._is_whole or shape != of_shape:
                kept = forward(*args, **keywords)
                if not self._is_last:
                    self._kept[block] = (shape, kept)
            return kept

        return run_or_recall


def deep_blocks(unet: Any) -> list[Any]:
    """All but the first block down and the last block up."""
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]
