"""Add LoRA changes to the resident weights in place, and put the originals back bit for bit.

`W = round(W0 + sum(scale * change))`: every change is computed from the pristine weight W0 in float32, all are summed,
and the sum is rounded once to the weight's dtype. The storage of a weight never moves, so compiled models and CUDA
graphs stay valid, and putting W0 back is a copy.

On CUDA one kernel does this for all targets whose changes are low-rank (`fused`), elsewhere and for other formats torch
does it target by target.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdxl_worker.errors import LoraIncompatible, RestoreFailed
from sdxl_worker.lora.factors import Part
from sdxl_worker.lora.formats.format import Change
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.lora.fused import FusedMerger
from sdxl_worker.memory import free_bytes, is_out_of_memory

logger = logging.getLogger(__name__)

# Left free on the GPU for activations when pristine copies are placed: SDXL at 1024 x 1024 with two pictures and its
# VAE decode take less.
ACTIVATION_RESERVE = 6 * 2**30


class Target(NamedTuple):
    """One parameter of the resident model, such as `unet`, `mid_block.attentions.0.proj_in`, `weight`.

    A tuple, because each merge looks thousands of them up: its hash takes an eighth of a dataclass's time.
    """

    component: str
    module: str
    parameter: str


class WeightMerger:
    """Owns the pristine copies of every weight a LoRA ever touched in this process, and what is merged right now."""

    def __init__(self, parameters: Mapping[Target, Tensor], fused: FusedMerger | None = None):
        """`parameters`: the live tensors, changed in place only; `fused`: what merges many of them at once."""
        self._live = parameters
        self._fused = fused
        self._pristine: dict[Target, Tensor] = {}
        self._merged: dict[Target, None] = {}
        self._place: str | None = None
        self._used_kernel = False

    @torch.no_grad()
    def update(self, changes: Mapping[Target, Sequence[tuple[Change, float]]]) -> None:
        """Set each target to its pristine value plus the sum of `scale * change`; those without a change are put back.

        All others stay as they are. On any exception some targets may be merged: call `restore`.
        """
        for target, parts in changes.items():
            if parts:
                pristine = self._keep_pristine(target)
                self._merged[target] = None
                with files_memory():
                    _merge_one(self._live[target], pristine, parts)
        self._put_back([target for target, parts in changes.items() if not parts and target in self._merged])

    @torch.no_grad()
    def update_at_once(self, parts: Sequence[Part], only: Collection[Target] | None = None) -> frozenset[Target]:
        """Like `update` for the targets (of `only` where these are given) that the kernel can do, which it returns.

        None of them where the kernel fails: that is logged, and it is not tried again.
        """
        targets = self._fused.targets(parts, only) if self._fused else []
        if self._fused is None or not targets:
            return frozenset()
        with files_memory():
            pristine = self._pristine_beside(targets)
            self._merged.update(dict.fromkeys(targets))
            self._used_kernel = True
            try:
                self._fused.merge(parts, pristine)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._fused = None
                reason = f"{type(error).__name__}: {error}"
                logger.warning("LoRAs are merged weight by weight: the kernel for all at once failed: %s", reason)
                return frozenset()
        return frozenset(targets)

    def _pristine_beside(self, targets: Sequence[Target]) -> dict[Target, Tensor]:
        """What holds each target's pristine value on its device: the weight itself where the copies are elsewhere."""
        pristine = {target: self._keep_pristine(target) for target in targets}
        if self._place != "host":
            return pristine
        if changed := [target for target in targets if target in self._merged]:
            torch._foreach_copy_([self._live[t] for t in changed], [pristine[t] for t in changed], non_blocking=True)
        return {target: self._live[target] for target in targets}

    @torch.no_grad()
    def reserve(self, targets: Iterable[Target]) -> None:
        """Make the pristine copies of `targets` now, so that merging them later takes no memory for good."""
        for target in targets:
            self._keep_pristine(target)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every merged weight back to its pristine bits. Raises RestoreFailed."""
        self._put_back(list(self._merged))

    def _put_back(self, targets: Sequence[Target]) -> None:
        if not targets:
            return
        try:
            live = [self._live[target] for target in targets]
            pristine = [self._pristine[target] for target in targets]
            torch._foreach_copy_(live, pristine, non_blocking=True)
            if live[0].is_cuda:
                # An asynchronous failure has to surface here, not in the next job. Other streams, such as the one that
                # copies the next job's LoRAs, are not waited for.
                torch.cuda.current_stream(live[0].device).synchronize()
        except RuntimeError as error:
            self._name_setting()
            raise RestoreFailed("the base model could not be put back after a LoRA") from error
        for target in targets:
            del self._merged[target]
        if not self._merged:
            self._used_kernel = False

    def _name_setting(self) -> None:
        """Say once, where the device failed while what the kernel merged was in use, how to do without it.

        Here every such failure is seen, whatever met it first: a lost device does not put weights back either.
        """
        if self._used_kernel:
            logger.error("the GPU failed while LoRAs were merged by the kernel: LORA_KERNEL=0 does without the kernel")
            self._used_kernel = False

    def _keep_pristine(self, target: Target) -> Tensor:
        if target not in self._pristine:
            live = self._live[target]
            if self._place is None:
                self._place = self._choose_place(live)
            if self._place == "host":
                copy = torch.empty_like(live, device="cpu", pin_memory=live.is_cuda).copy_(live)
            else:
                copy = live.detach().clone()
            self._pristine[target] = copy
        return self._pristine[target]

    def _choose_place(self, live: Tensor) -> str:
        """`device` beside the weights when all of them fit there twice, else `host` (page-locked)."""
        if not live.is_cuda:
            logger.info("pristine weights are kept in host memory, where the model is")
            return "device"
        needed = sum(tensor.numel() * tensor.element_size() for tensor in self._live.values())
        free = free_bytes(live.device)
        place = "device" if free - needed > ACTIVATION_RESERVE else "host"
        logger.info(
            "pristine weights are kept in %s memory: up to %.1f GB of %.1f GB free, %.1f GB stay for rendering",
            "GPU" if place == "device" else "page-locked host",
            needed / 2**30,
            free / 2**30,
            ACTIVATION_RESERVE / 2**30,
        )
        return place


@contextlib.contextmanager
def files_memory() -> Iterator[None]:
    """Memory that runs out inside was asked for by files, so that it is the caller who has to act: LoraIncompatible."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise LoraIncompatible(
                "the LoRAs need more memory than this worker has; use fewer or smaller ones"
            ) from error
        raise


def _merge_one(live: Tensor, pristine: Tensor, parts: Sequence[tuple[Change, float]]) -> None:
    device = live.device
    base = pristine.to(device, non_blocking=True)
    low_rank = [(change, scale) for change, scale in parts if isinstance(change, LowRank)]
    if len(low_rank) == len(parts) and (matrix := _as_matrix(live)) is not None:
        up, down, alpha = _joined(low_rank, live)
        pristine_matrix = _as_matrix(base)
        assert pristine_matrix is not None
        if live.dtype == torch.float32:
            # One fused product, straight into the live weight.
            torch.addmm(pristine_matrix, up, down, alpha=alpha, out=matrix)
        else:
            matrix.copy_(torch.addmm(pristine_matrix.float(), up, down, alpha=alpha))
        return
    weight = base.float()
    total = weight.clone()
    for change, scale in parts:
        total.add_(change.change(weight), alpha=scale)
    live.copy_(total)


def _as_matrix(weight: Tensor) -> Tensor | None:
    """The weight itself as (out, rest), a view; None where its memory order has no such view.

    The columns stand as they do in memory: those of a channels_last convolution by height, width, input.
    """
    if weight.is_contiguous():
        return weight.view(weight.shape[0], -1)
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return weight.permute(0, 2, 3, 1).view(weight.shape[0], -1)
    return None


def _joined(parts: Sequence[tuple[Change, float]], weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Several low-rank products as one: the factors side by side along the rank, scales folded into `up`.

    The columns of `down` are in the order of `_as_matrix(weight)`.
    """
    factors = [
        (change.up, _columns(change.down, weight), scale * change.factor)
        for change, scale in parts
        if isinstance(change, LowRank)
    ]
    if len(factors) == 1:
        up, down, alpha = factors[0]
        return up.float(), down.float(), alpha
    up = torch.cat([up.float() * factor for up, _, factor in factors], dim=1)
    return up, torch.cat([down.float() for _, down, _ in factors]), 1.0


def _columns(down: Tensor, weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return down
    # Of a small matrix, not of the weight.
    return down.view(down.shape[0], *weight.shape[1:]).permute(0, 2, 3, 1).reshape(down.shape)
