"""LoRAs on a resident pipeline: read and match files, keep them in memory, apply and take away."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_worker.lora.file import read_lora
from sdxl_worker.lora.formats.format import Change
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

    def __init__(self, pipeline: StableDiffusionXLPipeline, ram_cache_bytes: int, sender: Sender | None = None) -> None:
        """`ram_cache_bytes` bounds the parsed files kept in host memory, least recently used out first.

        `sender` copies files to the device before they are merged; by default on a stream of its own on a GPU.
        """
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
            parsed = ParsedLora(content.facts, matched, content.data, bundled)
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
