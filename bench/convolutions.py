"""Merging into channels_last convolutions against contiguous ones: a part of `bench.lora_costs`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.instruments import Clock, spread
from bench.lora_files import SCALE
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.lora.merge import Target, WeightMerger

# Four of the UNet's 3 x 3 convolutions at full size, and how many columns and rows of them change.
CONVOLUTIONS, CONVOLUTION_SHAPE, CONVOLUTION_RANK = 4, (640, 640, 3, 3), 32


def convolutions_on(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Merging into channels_last convolutions against contiguous ones, by torch's own operations, in turns."""
    clock, device, dtype = Clock(pipeline.device.type), pipeline.device, pipeline.unet.dtype
    shape = tuple(getattr(options, "convolution", CONVOLUTION_SHAPE))
    random = torch.Generator().manual_seed(0)
    down = torch.randn(CONVOLUTION_RANK, shape[1] * shape[2] * shape[3], generator=random).half().to(device)
    up = (0.02 * torch.randn(shape[0], CONVOLUTION_RANK, generator=random)).half().to(device)
    targets = [Target("unet", str(index), "weight") for index in range(CONVOLUTIONS)]
    changes = {target: [(LowRank(up, down, 0.5), SCALE)] for target in targets}

    def merger(order: torch.memory_format) -> WeightMerger:
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        return WeightMerger(
            {target: weight.to(device, dtype, copy=True).contiguous(memory_format=order) for target in targets}
        )

    def seconds(one: WeightMerger) -> float:
        taken = clock.time(lambda: one.update(changes))
        one.restore()
        return taken

    orders, pairs = (torch.channels_last, torch.contiguous_format), []
    for turn in range(options.repeats):
        # New ones each time, and each order first as often: where memory lies is worth more than what is measured.
        mergers = {order: merger(order) for order in (orders, orders[::-1])[turn % 2]}
        for one in mergers.values():
            seconds(one)
        taken = {order: seconds(one) for order, one in mergers.items()}
        pairs.append([taken[order] for order in orders])
    return {
        "weights": f"{CONVOLUTIONS} of {' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}",
        "rank": CONVOLUTION_RANK,
        "channels_last_s": spread([last for last, _ in pairs]),
        "contiguous_s": spread([plain for _, plain in pairs]),
        "ratio": spread([last / plain for last, plain in pairs]),
    }
