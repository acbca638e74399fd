"""A LoRA file as the engine keeps it in host memory, and its way to the device."""

from __future__ import annotations

import functools
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from sdxl_worker.background import in_background
from sdxl_worker.lora.factors import Factors
from sdxl_worker.lora.file import LoraFacts, autov3
from sdxl_worker.lora.formats.format import Change, map_tensors, tensors_of
from sdxl_worker.lora.match import Matched
from sdxl_worker.lora.merge import Target
from sdxl_worker.lora.transfer import HostData
from sdxl_worker.prompts.bundled import Bundled

# What a tensor costs beside its data: the views, their places in the model, their share of dicts and of names.
OBJECT_BYTES = 2048


@dataclass(frozen=True)
class ParsedLora:
    """A LoRA file in host memory, checked and matched to the resident model; `warnings` are for the answer.

    `data` (uint8, 1-D) is the file's, of which the tensors of `matched` are views where nothing had to be computed.
    `factors` is what the kernel that merges many weights at once needs of it; None where there is no such kernel.
    """

    facts: LoraFacts
    matched: Matched = field(repr=False)
    data: torch.Tensor = field(repr=False)
    bundled: Bundled = field(default_factory=Bundled, repr=False)
    factors: Factors | None = field(default=None, repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to tell the caller."""
        return (*self.matched.warnings, *self.bundled.warnings)

    @property
    def autov3(self) -> str:
        """Waits for what start_hashing began."""
        return self._hashing.result()

    def start_hashing(self) -> None:
        """Compute `autov3` once, beside what else is done: it takes 0.2 s for a large file."""
        _ = self._hashing

    @functools.cached_property
    def _hashing(self) -> Future[str]:
        return in_background(lambda: autov3(self.data), "AutoV3")

    @functools.cached_property
    def size(self) -> int:
        """Bytes of host memory: the file's data, what was computed from it, and the objects that hold both."""
        storages = {self.data.untyped_storage().data_ptr(): _taken_by(self.data)}
        tensors = [tensor for change in self.matched.changes.values() for tensor in tensors_of(change)]
        for tensor in tensors:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return sum(storages.values()) + OBJECT_BYTES * (len(tensors) + 1)

    @functools.cached_property
    def host_data(self) -> HostData:
        """`data` and its way to the device."""
        return HostData(self.data)

    def data_on(self, device: torch.device) -> torch.Tensor:
        """`data` itself, or its copy on `device`: one transfer of the whole file, which may still be under way.

        The current stream waits for it where it was sent ahead.
        """
        return self.host_data.on(device)

    def changes_in(self, data: torch.Tensor, targets: Collection[Target] | None = None) -> dict[Target, Change]:
        """The changes, of `targets` where these are given, with their tensors in what `data_on` gave."""
        chosen = (
            self.matched.changes if targets is None else {target: self.matched.changes[target] for target in targets}
        )
        if data is self.data:
            return chosen

        of_type: dict[torch.dtype, torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            place = self._places.get(id(tensor))
            if place is None:
                return tensor.to(data.device, non_blocking=True)
            dtype = tensor.dtype
            if dtype not in of_type:
                of_type[dtype] = data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            return of_type[dtype].as_strided(*place)

        return {target: map_tensors(change, move) for target, change in chosen.items()}

    @functools.cached_property
    def _places(self) -> dict[int, tuple[torch.Size, tuple[int, ...], int]]:
        """Shape, strides and offset in `data` by `id` of the tensors that are views of it, counted in their elements.

        Computed once: a file has thousands, and each merge on a device cuts up another copy.
        """
        storage, begin = self.data.untyped_storage().data_ptr(), self.data.data_ptr()
        tensors = [tensor for change in self.matched.changes.values() for tensor in tensors_of(change)]
        return {
            id(tensor): (tensor.shape, tensor.stride(), (tensor.data_ptr() - begin) // tensor.element_size())
            for tensor in tensors
            if tensor.untyped_storage().data_ptr() == storage
            and not (tensor.data_ptr() - begin) % tensor.element_size()
        }


def _taken_by(data: torch.Tensor) -> int:
    """Bytes of host memory behind `data`: torch takes page-locked memory in powers of two."""
    size = data.untyped_storage().nbytes()
    return 1 << (size - 1).bit_length() if size and data.is_pinned() else size
