"""Which of torch's operations a piece of code runs, and which of them would wait for a device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations inside by name, and the elements of the tensors that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if isinstance(result, Tensor):
            self.elements[name] += result.numel()
        return result


class Waits(TorchDispatchMode):
    """Names what inside would make the CPU wait for a device, with the meta device in that device's place.

    Reading a value of a meta tensor raises of itself, as does searching one or copying it to the CPU. What is left is
    sending something from pageable memory, and the check of a solved system.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._calls = _WaitingCalls(self.names)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        sends = name in ("_to_copy", "copy_") and any(_is_on(arg, "cpu") for arg in args) and _is_on(result, "meta")
        waits = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        if sends and waits:
            self.names.append(name)
        return result


class _WaitingCalls(TorchFunctionMode):
    """What the dispatcher does not show."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.solve and _is_on(args[0], "meta"):
            self._names.append("solve")
        if func is Tensor.__getitem__ and isinstance(args[1], list) and _is_on(args[0], "meta"):
            self._names.append("index by list")
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and _is_on(result, "meta") and not _is_on(args[0], "meta"):
            self._names.append("tensor")
        return result


def _is_on(value: Any, device: str) -> bool:
    return isinstance(value, Tensor) and value.device.type == device
