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
from sdxl_worker.memory import free_bytes

logger = logging.getLogger(__name__)

# Left to the driver and to libraries, which take theirs beside torch's pool.
DRIVER_RESERVE = 512 * 2**20


class Transfer(Protocol):
    """A copy that has begun."""

    def ready(self) -> Tensor:
        """The copy, for work that the current stream gets from now on; the host does not wait for it."""

    def let_go(self) -> None:
        """No more work that reads the copy will be given to any stream."""


class Sender(Protocol):
    """Begins copies of host memory on the device."""

    def send(self, data: Tensor) -> Transfer | None:
        """Begin to copy `data` (uint8, 1-D); None where there is no memory to spare, or it cannot be done."""


class OwnStream:
    """Sends from page-locked memory on a CUDA stream of its own, beside what renders on another."""

    def __init__(self, device: torch.device) -> None:
        """`device` is a CUDA device."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, data: Tensor) -> Transfer | None:
        """None as well where it fails, for lack of memory or because the device is lost.

        The copy is then made when the weights are merged, and what is wrong shows there: where the device is watched.
        """
        try:
            if not self._fits(data.numel()):
                return None
            # Memory from the stream's own pool: it is never that of a tensor which the rendering stream still reads.
            with torch.cuda.stream(self._stream):
                copy = torch.empty(data.numel(), dtype=data.dtype, device=self._device)
                copy.copy_(data, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._stream)
        except RuntimeError as error:
            logger.info("a LoRA is not sent ahead: %s", type(error).__name__)
            return None
        return _OnOwnStream(copy, done, self._stream)

    def _fits(self, size: int) -> bool:
        """Enough stays for what renders, and nothing is taken from what torch keeps for it."""
        unused, _ = torch.cuda.mem_get_info(self._device)
        return unused - size >= DRIVER_RESERVE and free_bytes(self._device) - size >= ACTIVATION_RESERVE


class _OnOwnStream:
    def __init__(self, copy: Tensor, done: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        self._copy, self._done, self._stream = copy, done, stream
        self._readers: list[torch.cuda.Stream] = []

    def ready(self) -> Tensor:
        current = torch.cuda.current_stream(self._copy.device)
        current.wait_event(self._done)
        self._readers.append(current)
        return self._copy

    def let_go(self) -> None:
        """The memory is the own stream's, which may write to it again only when the others have read it.

        Not by `record_stream`, which asks the device when the tensor dies: a lost one would end the process there.
        """
        # On a lost device no more will be written.
        with contextlib.suppress(RuntimeError):
            for reader in self._readers:
                self._stream.wait_stream(reader)


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
                if not self._waiting and self._transfer is not None:
                    self._transfer.let_go()
                    self._transfer = None

    def on(self, device: torch.device) -> Tensor:
        """The data on `device`: what was sent ahead, or else a copy that the current stream makes now."""
        with self._lock:
            transfer = self._transfer
        if transfer is not None:
            return transfer.ready()
        return self._data if device == self._data.device else self._data.to(device, non_blocking=True)
