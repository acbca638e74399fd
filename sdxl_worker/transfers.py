"""Small things on their way to the device and back, which neither the CPU nor the device waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch


def sent(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor.to(device, dtype)` without waiting for what the device is doing.

    From pageable memory the copy, however small, would wait for it. torch keeps the page-locked block until it is done.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def fetched(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin a copy in host memory; what it gives waits for that copy, in any thread."""
    # Page-locked memory, where it comes from a GPU.
    copy = tensor.detach().to("cpu", non_blocking=True, copy=True)
    there = reached(tensor.device)

    def result() -> torch.Tensor:
        if there is not None:
            there.synchronize()
        return copy

    return result


def reached(device: torch.device) -> torch.cuda.Event | None:
    """What says when the device has done all that it was asked for until now; None where that is at once."""
    if device.type != "cuda":
        return None
    # Blocking: the thread that waits sleeps, instead of keeping a core busy.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
