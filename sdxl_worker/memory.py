"""How torch says that there is not enough memory, and how to have some again."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# How CUDA, its libraries and the CPU's allocator word it where they do not raise torch.OutOfMemoryError.
_WORDS = (
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory"),
    # Of a convolution, which tries every way that cuDNN has, and for which none had room for its scratch memory. What
    # a GPU cannot do at all is seen when the worker starts.
    *("unable to find an engine to execute this computation", "Unable to find a valid cuDNN algorithm"),
)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, Python's garbage collector does not run by itself.

    Importing torch and diffusers makes 480,000 objects that stay: looking through them again and again is a fifth of
    the time that it takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_libraries() -> None:
    """Import what loading and rendering need of diffusers and transformers, which takes seconds.

    What they have made then stays for good: looking through it again in every full collection costs a job some 0.3 s.
    """
    with collector_paused():
        from diffusers import StableDiffusionXLPipeline  # noqa: F401
    gc.freeze()


def is_out_of_memory(error: BaseException) -> bool:
    """True when `error` says that host or device memory ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def free_memory(error: Exception) -> None:
    """Let go of what the frames of `error` and of what led to it hold, on the host and on the device.

    Not after a failure of the device itself: giving memory back to a lost one raises, and ends the process where it is
    page-locked.
    """
    import torch

    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """What is free on the GPU, with what torch keeps there for the next one who asks."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
