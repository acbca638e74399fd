"""A device's memory in tests: how much of it is in use, and how it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's allocator for CUDA hands out multiples of 512 bytes. What is larger than 1 MB comes from other segments than
# the rest, so that a hole of up to 2 MB among those is found by the size between.
_SIZES = (*(1 << bits for bits in range(36, 20, -1)), (1 << 20) + 512, *(1 << bits for bits in range(20, 8, -1)))


class Memory:
    """The memory of `device`, "cpu" or "cuda".

    On a GPU it runs out for real: all that the allocator can give is taken, so that whoever asks next gets torch's own
    OutOfMemoryError. On the CPU, where nothing keeps a test from taking the whole machine's, that error is raised.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.ran_out = 0
        self._taken: list[Tensor] = []

    def run_out(self, *_: object) -> None:
        """From now on there is none, not even 512 bytes, until `release`."""
        self.ran_out += 1
        if self.device == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        for size in _SIZES:
            while self._takes(size):
                pass

    def leave(self, size: int) -> None:
        """From now on the allocator keeps what it has, and gets at most `size` bytes more, until `release`."""
        assert self.device == "cuda"
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)

    def release(self) -> None:
        """Give everything back."""
        self._taken.clear()
        if self.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()

    def _takes(self, size: int) -> bool:
        try:
            self._taken.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        except torch.OutOfMemoryError:
            return False
        return True

    @property
    def in_use(self) -> int:
        """Bytes that torch's allocator has handed out on a GPU; 0 on the CPU, whose allocator does not count."""
        if self.device == "cpu":
            return 0
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()


@contextmanager
def running_out(memory: Memory, module: torch.nn.Module, when: Callable[..., bool]) -> Iterator[None]:
    """Inside, memory runs out just before a call of `module` for whose inputs `when` is true; afterwards it is back."""

    def before(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if not memory.ran_out and when(*inputs):
            memory.run_out()

    memory.ran_out = 0
    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        memory.release()


class RunsOutAt(TorchDispatchMode):
    """Lets memory run out before the `number`-th of torch's operations inside that gives a new tensor of the device's.

    Counts them. A cast or a copy to the host counts too.
    """

    def __init__(self, memory: Memory, number: int) -> None:
        super().__init__()
        self.count = 0
        self._memory, self._number = memory, number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func._schema.is_mutable) and self._is_of_the_device((args, kwargs)):
            self.count += 1
            if self.count == self._number:
                self._memory.run_out()
        return func(*args, **(kwargs or {}))

    def _is_of_the_device(self, arguments: Any) -> bool:
        places = [getattr(value, "device", value) for value in tree_leaves(arguments)]
        return any(isinstance(place, torch.device) and place.type == self._memory.device for place in places)
