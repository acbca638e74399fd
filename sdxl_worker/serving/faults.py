"""What an exception of the libraries means for the job and for this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sdxl_worker.errors import DeviceFailed, OutOfMemory, WorkerError
from sdxl_worker.memory import free_memory, is_out_of_memory

_DEVICE_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "device-side assert", "NCCL error")


def as_worker_error(error: Exception) -> WorkerError:
    """The failure to report for `error`; what nobody foresaw becomes INTERNAL, without details."""
    if isinstance(error, WorkerError):
        return error
    text = str(error)
    if is_out_of_memory(error):
        return OutOfMemory("not even one picture of this size fits the memory; ask for a smaller one")
    if isinstance(error, torch.AcceleratorError) or _mentions(error, text, _DEVICE_WORDS):
        return DeviceFailed("the GPU failed; a fresh worker will take the next try")
    return WorkerError("the worker failed in a way that nobody foresaw; its log has the details")


def _mentions(error: Exception, text: str, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in text for word in words)


class Health:
    """Whether this process can still be trusted.

    One picture that is too large says nothing about the process, two in a row that run out of memory do. After an
    error whose class says so, every later job is refused, because its picture could be wrong.
    """

    def __init__(self) -> None:
        self._out_of_memory_in_a_row = 0
        self._fatal: WorkerError | None = None
        self._kept: Exception | None = None

    @property
    def is_lost(self) -> bool:
        """True after an error after which this process must not render any more."""
        return self._fatal is not None

    def check(self) -> None:
        """Raise the error after which this process must not render any more, if there was one."""
        if self._fatal is not None:
            raise type(self._fatal)(str(self._fatal))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around everything that uses the device: refuse it after a fatal error, note how it ends, free its memory.

        All before the device is passed on, so that the job that waits for it finds a good one or none.
        """
        self.check()
        try:
            yield
        except Exception as error:
            failure = as_worker_error(error)
            if type(failure).refresh_worker:
                # With its frames and what they hold: a lost device takes nothing back. Giving it page-locked memory
                # that it has read ends the process at once, before the job has its answer.
                self._fatal, self._kept = failure, self._kept or error
            elif not failure.caller_at_fault:
                free_memory(error)
            raise

    @contextlib.contextmanager
    def rendering(self) -> Iterator[None]:
        """Around rendering alone: what a file takes while it is read or merged says nothing about this process.

        The second time in a row that memory runs out here, the OutOfMemory that leaves asks for a fresh worker.
        """
        try:
            yield
        except Exception as error:
            failure = as_worker_error(error)
            if not isinstance(failure, OutOfMemory):
                raise
            self._out_of_memory_in_a_row += 1
            failure.refresh_worker = self._out_of_memory_in_a_row > 1
            if failure is error:
                raise
            raise failure from error
        self._out_of_memory_in_a_row = 0
