"""LoRAs on a resident pipeline: read and match files, keep them in memory, apply and take away."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdxl_worker.background import in_background
from sdxl_worker.lora.file import LoraFacts, autov3, read_lora
from sdxl_worker.lora.formats.format import Change, map_tensors, tensors_of
from sdxl_worker.lora.keys import COMPONENTS, UNET, ResidentModules
from sdxl_worker.lora.match import Matched, match_lora
from sdxl_worker.lora.merge import Target, WeightMerger, files_memory
from sdxl_worker.prompts.bundled import Bundled, bundled_in
from sdxl_worker.prompts.vectors import widths_of
from sdxl_worker.request import LoraScale

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


# What a tensor costs beside its data: the views, their places in the model, their share of dicts and of names.
OBJECT_BYTES = 2048


@dataclass(frozen=True)
class ParsedLora:
    """A LoRA file in host memory, checked and matched to the resident model; `warnings` are for the answer.

    `data` (uint8, 1-D) is the file's, of which the tensors of `matched` are views where nothing had to be computed.
    """

    facts: LoraFacts
    matched: Matched = field(repr=False)
    data: torch.Tensor = field(repr=False)
    bundled: Bundled = field(default_factory=Bundled, repr=False)

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
        storages = {self.data.untyped_storage().data_ptr(): self.data.untyped_storage().nbytes()}
        tensors = [tensor for change in self.matched.changes.values() for tensor in tensors_of(change)]
        for tensor in tensors:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values()) + OBJECT_BYTES * (len(tensors) + 1)

    def data_on(self, device: torch.device) -> torch.Tensor:
        """`data` itself, or its copy on `device`: one transfer of the whole file, which may still be under way."""
        return self.data.to(device, non_blocking=True)

    def changes_in(self, data: torch.Tensor, targets: Collection[Target] | None = None) -> dict[Target, Change]:
        """The changes, of `targets` where these are given, with their tensors in what `data_on` gave."""
        chosen = (
            self.matched.changes if targets is None else {target: self.matched.changes[target] for target in targets}
        )
        if data is self.data:
            return chosen

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() != self.data.untyped_storage().data_ptr():
                return tensor.to(data.device, non_blocking=True)
            begin = tensor.data_ptr() - self.data.data_ptr()
            part = data[begin : begin + tensor.numel() * tensor.element_size()]
            return part.view(tensor.dtype).view(tensor.shape)

        return {target: map_tensors(change, move) for target, change in chosen.items()}


Lora = tuple[ParsedLora, LoraScale]


@dataclass(frozen=True)
class AppliedLora:
    """What one LoRA did: `layers` is how many modules it changed at its scale."""

    layers: int
    warnings: tuple[str, ...] = ()


def targets_of(lora: Lora, components: Collection[str] = COMPONENTS) -> list[Target]:
    """The weights and biases of `components` that the LoRA changes at its scale."""
    parsed, scale = lora
    changed = [component for component in components if getattr(scale, component)]
    return [target for target in parsed.matched.changes if target.component in changed]


def layers_of(lora: Lora, components: Collection[str] = COMPONENTS) -> int:
    """How many modules of `components` the LoRA changes at its scale."""
    return len({(target.component, target.module) for target in targets_of(lora, components)})


class LoraEngine:
    """The LoRA side of one resident pipeline. Only `read`, which touches no weight, may run beside a render."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, ram_cache_bytes: int):
        """`ram_cache_bytes` bounds the parsed files kept in host memory, least recently used out first."""
        self._modules = ResidentModules({name: getattr(pipeline, name) for name in COMPONENTS})
        self._live = {
            Target(component, name, parameter): tensor
            for component, modules in self._modules.modules.items()
            for name, module in modules.items()
            for parameter in ("weight", "bias")
            if (tensor := getattr(module, parameter, None)) is not None
        }
        self._merger = WeightMerger(self._live)
        self._cache: OrderedDict[tuple[int, ...], ParsedLora] = OrderedDict()
        self._cache_bytes = ram_cache_bytes
        self._cache_lock = threading.Lock()
        self._device = pipeline.device
        self._widths = widths_of(pipeline)

    def read(self, path: Path) -> ParsedLora:
        """The file at `path`, from memory when this very file was read before (a stat, no disk read, no parsing).

        Raises AssetFileError: WrongFile, BadFile, or LoraIncompatible when it does not fit the resident model or the
        memory. The pipeline is not touched.
        """
        state = os.stat(path)
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        with self._cache_lock:
            parsed = self._cache.get(key)
        if parsed is None:
            with files_memory():
                content = read_lora(path, pinned=self._device.type == "cuda")
                matched = match_lora(content, self._modules)
                bundled = bundled_in(content.keys.bundled, content.tensors, self._widths)
            parsed = ParsedLora(content.facts, matched, content.data, bundled)
        self._remember(key, parsed)
        return parsed

    def apply(self, loras: Sequence[Lora]) -> list[AppliedLora]:
        """Merge the LoRAs, all from the pristine weights, replacing whatever was merged; one AppliedLora each.

        On an exception the weights are put back before it propagates. Raises LoraIncompatible when the files need more
        memory than there is, and RestoreFailed.
        """
        changes = self._changes_of(loras)
        try:
            self._merger.merge(changes)
        except BaseException:
            self._merger.restore()
            raise
        return [AppliedLora(layers_of(lora), lora[0].warnings) for lora in loras]

    def reserve(self, loras: Iterable[Lora]) -> None:
        """Make now the untouched copies of all UNet weights that the LoRAs change: `reapply_unet` then makes none."""
        self._merger.reserve(dict.fromkeys(target for lora in loras for target in targets_of(lora, (UNET,))))

    def reapply_unet(self, loras: Sequence[Lora], *, switched: Sequence[Lora]) -> None:
        """Give the UNet's weights that any of `switched` changes the changes of `loras`, from the pristine weights.

        For the moment between two steps: `switched` are those that were merged and are no longer among `loras`, and
        those that are new there. All other weights stay as they are, those of the text encoders among them, since the
        prompts are encoded. On an exception the weights have to be restored. Raises like `apply`.
        """
        changes: dict[Target, list[tuple[Change, float]]] = {
            target: [] for lora in switched for target in targets_of(lora, (UNET,))
        }
        wanted = self._changes_of([lora for lora in loras if not changes.keys().isdisjoint(targets_of(lora, (UNET,)))])
        self._merger.update({target: wanted.get(target, []) for target in changes})

    def _changes_of(self, loras: Sequence[Lora]) -> dict[Target, list[tuple[Change, float]]]:
        """Each changed weight's changes with their strengths, on the device. Raises LoraIncompatible for no memory."""
        changes: dict[Target, list[tuple[Change, float]]] = {}
        for parsed, scale in loras:
            with files_memory():
                moved = parsed.changes_in(parsed.data_on(self._device))
            for target, change in moved.items():
                strength = getattr(scale, target.component)
                if strength:
                    changes.setdefault(target, []).append((change, strength))
        return changes

    @contextlib.contextmanager
    def applied(self, loras: Sequence[Lora]) -> Iterator[list[AppliedLora]]:
        """Inside, the LoRAs are merged; on the way out, whatever happens, every weight has its pristine bits again.

        Raises AssetFileError before a weight is touched, RestoreFailed on the way out.
        """
        try:
            yield self.apply(loras)
        finally:
            self.restore()

    def restore(self) -> None:
        """Take every LoRA away: all weights have their pristine bits again. Raises RestoreFailed."""
        self._merger.restore()

    def _remember(self, key: tuple[int, ...], parsed: ParsedLora) -> None:
        with self._cache_lock:
            self._cache[key] = parsed
            self._cache.move_to_end(key)
            total = sum(entry.size for entry in self._cache.values())
            while self._cache and total > self._cache_bytes:
                total -= self._cache.popitem(last=False)[1].size
