"""LoRA files on their way to the GPU: copied on a stream of their own while another job still renders."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sdxl_worker.lora.merge import ACTIVATION_RESERVE
from sdxl_worker.memory import free_bytes, is_out_of_memory

logger = logging.getLogger(__name__)

# Left to the driver and to libraries, which take theirs beside torch's pool.
DRIVER_RESERVE = 512 * 2**20


class Transfer(Protocol):
    """A copy that has begun."""

    def ready(self) -> Tensor:
        """The copy, for work that the current stream gets from now on; the host does not wait for it."""


class Sender(Protocol):
    """Begins copies of host memory on the device."""

    def send(self, data: Tensor) -> Transfer | None:
        """Begin to copy `data` (uint8, 1-D); None where that would take memory that a render may need."""


class OwnStream:
    """Sends from page-locked memory on a CUDA stream of its own, beside what renders on another."""

    def __init__(self, device: torch.device) -> None:
        """`device` is a CUDA device."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, data: Tensor) -> Transfer | None:
        """None as well where memory runs out: the copy is then made when the weights are merged."""
        if not self._fits(data.numel()):
            return None
        try:
            # Memory from the stream's own pool: it is never that of a tensor which the rendering stream still reads.
            with torch.cuda.stream(self._stream):
                copy = torch.empty(data.numel(), dtype=data.dtype, device=self._device)
                copy.copy_(data, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._stream)
        except RuntimeError as error:
            if is_out_of_memory(error):
                logger.info("no memory to send a LoRA ahead")
                return None
            raise
        return _OnOwnStream(copy, done)

    def _fits(self, size: int) -> bool:
        """Enough stays for what renders, and nothing is taken from what torch keeps for it."""
        unused, _ = torch.cuda.mem_get_info(self._device)
        return unused - size >= DRIVER_RESERVE and free_bytes(self._device) - size >= ACTIVATION_RESERVE


class _OnOwnStream:
    def __init__(self, copy: Tensor, done: torch.cuda.Event) -> None:
        self._copy, self._done = copy, done

    def ready(self) -> Tensor:
        current = torch.cuda.current_stream(self._copy.device)
        current.wait_event(self._done)
        # The memory is the other stream's: it may have it back only when the current one has read it.
        self._copy.record_stream(current)
        return self._copy


def sender_for(device: torch.device) -> Sender | None:
    """None where the model is in host memory: there is nothing to send."""
    return OwnStream(device) if device.type == "cuda" else None


class HostData:
    """A file's data in host memory, and its copy on the device as long as a job that waits asks for one."""

    def __init__(self, data: Tensor) -> None:
        """`data`: uint8, 1-D."""
        self._data = data
        self._lock = threading.Lock()
        self._transfer: Transfer | None = None
        self._waiting = 0

    @contextlib.contextmanager
    def sent_ahead(self, sender: Sender) -> Iterator[None]:
        """Inside, the copy is on its way or there, if the memory is enough for it; afterwards it is let go."""
        with self._lock:
            self._waiting += 1
        try:
            with self._lock:
                if self._transfer is None:
                    self._transfer = sender.send(self._data)
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._transfer = None

    def on(self, device: torch.device) -> Tensor:
        """The data on `device`: what was sent ahead, or else a copy that the current stream makes now."""
        with self._lock:
            transfer = self._transfer
        if transfer is not None:
            return transfer.ready()
        return self._data if device == self._data.device else self._data.to(device, non_blocking=True)
