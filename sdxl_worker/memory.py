"""How torch says that there is not enough memory."""

from __future__ import annotations

# How CUDA, its libraries and the CPU's allocator word it where they do not raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True when `error` says that host or device memory ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
