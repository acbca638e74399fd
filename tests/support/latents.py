"""The latents of a render, and a picture and a mask to start one from."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest

START = Image.linear_gradient("L").convert("RGB").resize((64, 64))
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (13, 10, 45, 40))


def drawn(pipeline: Any, request: GenerationRequest, **options: Any) -> torch.Tensor:
    """The latents that the request's pictures are decoded from: they show more than a random VAE's pictures do."""
    last: list[torch.Tensor] = []
    render(pipeline, request, on_step=lambda _step, _total, latents: last.append(latents), **options)
    return last[-1]


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((first - second).abs().max() / first.abs().max())
