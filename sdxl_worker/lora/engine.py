"""LoRAs on a resident pipeline: read and match files, keep them in memory, apply and take away."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sdxl_worker.lora.factors import Part
from sdxl_worker.lora.file import read_lora
from sdxl_worker.lora.formats.format import Change
from sdxl_worker.lora.fused import FusedMerger
from sdxl_worker.lora.keys import COMPONENTS, UNET, ResidentModules
from sdxl_worker.lora.match import match_lora
from sdxl_worker.lora.merge import Target, WeightMerger, files_memory
from sdxl_worker.lora.parsed import ParsedLora
from sdxl_worker.lora.transfer import Sender, sender_for
from sdxl_worker.prompts.bundled import bundled_in
from sdxl_worker.prompts.vectors import widths_of
from sdxl_worker.request import LoraScale

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


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
    """The LoRA side of a resident pipeline. `read` and `sent_ahead`, which touch no weight, may run beside a render."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        ram_cache_bytes: int,
        sender: Sender | None = None,
        fused: Callable[[Mapping[Target, Tensor]], FusedMerger] | None = None,
        kernel: bool = True,
    ) -> None:
        """`ram_cache_bytes` bounds the parsed files kept in host memory, least recently used out first.

        `sender` copies files to the device before they are merged; by default on a stream of its own on a GPU. `fused`
        makes what merges low-rank changes at once; by default there is one on a GPU, without `kernel` nowhere.
        """
        self._modules = ResidentModules({name: getattr(pipeline, name) for name in COMPONENTS})
        self._live = {
            Target(component, name, parameter): tensor
            for component, modules in self._modules.modules.items()
            for name, module in modules.items()
            for parameter in ("weight", "bias")
            if (tensor := getattr(module, parameter, None)) is not None
        }
        self._components = np.array([COMPONENTS.index(target.component) for target in self._live])
        self._device = pipeline.device
        if fused is None and self._device.type == "cuda":
            fused = FusedMerger
        self._fused = fused(self._live) if fused and kernel else None
        self._merger = WeightMerger(self._live, self._fused)
        self._cache: OrderedDict[tuple[int, ...], ParsedLora] = OrderedDict()
        self._cache_bytes = ram_cache_bytes
        self._cache_lock = threading.Lock()
        self._sender = sender or sender_for(self._device)
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
            factors = self._fused.factors_of(matched.changes, content.data) if self._fused else None
            parsed = ParsedLora(content.facts, matched, content.data, bundled, factors)
        self._remember(key, parsed)
        return parsed

    @contextlib.contextmanager
    def sent_ahead(self, loras: Iterable[Lora]) -> Iterator[None]:
        """Inside, the files are on the device or on their way there, as far as it has memory to spare for them.

        May begin while another job renders; touches no weight. The first `apply` inside copies only what is missing.
        """
        with contextlib.ExitStack() as stack:
            if self._sender is not None:
                for parsed, _ in loras:
                    stack.enter_context(parsed.host_data.sent_ahead(self._sender))
            yield

    def apply(self, loras: Sequence[Lora]) -> list[AppliedLora]:
        """Merge the LoRAs, all from the pristine weights, replacing whatever was merged; one AppliedLora each.

        On an exception the weights are put back before it propagates. Raises LoraIncompatible when the files need more
        memory than there is, and RestoreFailed.
        """
        try:
            self._merger.restore()
            self._merge(loras)
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
        changed = {target for lora in switched for target in targets_of(lora, (UNET,))}
        self._merge([lora for lora in loras if not changed.isdisjoint(targets_of(lora, (UNET,)))], changed)

    def _merge(self, loras: Sequence[Lora], only: Collection[Target] | None = None) -> None:
        """Give the weights (`only` these, where they are given) the changes of `loras`, or put them back for none.

        Raises LoraIncompatible for no memory.
        """
        with files_memory():
            moved = [parsed.data_on(self._device) for parsed, _ in loras]
        parts = [self._part(lora, data) for lora, data in zip(loras, moved, strict=True)] if self._fused else []
        done = self._merger.update_at_once(parts, only)
        changes: dict[Target, list[tuple[Change, float]]] = {target: [] for target in only or () if target not in done}
        for lora, data in zip(loras, moved, strict=True):
            parsed, scale = lora
            left = [t for t in targets_of(lora) if t not in done and (only is None or t in only)]
            with files_memory():
                on_device = parsed.changes_in(data, left)
            for target, change in on_device.items():
                changes.setdefault(target, []).append((change, getattr(scale, target.component)))
        self._merger.update(changes)

    def _part(self, lora: Lora, data: Tensor) -> Part:
        parsed, scale = lora
        assert parsed.factors is not None
        strengths = np.array([getattr(scale, component) for component in COMPONENTS], np.float64)
        return Part(parsed.factors, data, strengths[self._components])

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
