"""A pipeline's states that a measurement goes to and comes back from: channels_last, compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sdxl_worker.generate import compiled

# Inside, a pipeline is in it.
State = Callable[[], AbstractContextManager[None]]


class ChannelsLast:
    """UNet and VAE in channels_last and back. Both layouts are kept: addresses are the same each time, and exactly as
    they were at the end."""

    def __init__(self, pipeline: Any) -> None:
        self._models = (pipeline.unet, pipeline.vae)
        self._tensors = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        self._kept: list[torch.Tensor] = []

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, convolutions lie in channels_last."""
        before = [tensor.data for tensor in self._tensors]
        if self._kept:
            _point(self._tensors, self._kept)
        else:
            for model in self._models:
                model.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            self._kept = [tensor.data for tensor in self._tensors]
            _point(self._tensors, before)


def _point(tensors: list[torch.Tensor], data: list[torch.Tensor]) -> None:
    for tensor, values in zip(tensors, data, strict=True):
        tensor.data = values


class Compiled:
    """COMPILE=1 and back: compiled, and warmed up as the worker does, the first time it is entered."""

    def __init__(self, pipeline: Any, backend: str | Callable[..., Any] = "inductor") -> None:
        self._pipeline, self._backend = pipeline, backend
        self.layout = ChannelsLast(pipeline)
        self._calls: dict[nn.Module, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the blocks run compiled; raises RuntimeError where they cannot."""
        modules = [*self._pipeline.unet.modules(), *self._pipeline.vae.modules()]
        with self.layout.entered():
            try:
                if self._calls:
                    for module, call in self._calls.items():
                        module._compiled_call_impl = call
                else:
                    compiled.compile_in_place(self._pipeline, self._backend)
                    compiled.warm_up(self._pipeline)
                    self._calls = {module: call for module in modules if (call := module._compiled_call_impl)}
                if not compiled.is_compiled(self._pipeline):
                    raise RuntimeError("the model cannot be compiled here: the log says why")
                yield
            finally:
                for module in self._calls:
                    module._compiled_call_impl = None


def graphs() -> int:
    """How many graphs torch has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
