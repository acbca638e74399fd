"""Rough pictures of where a run stands, made beside it: the run waits for none of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import torch
from PIL import Image

from sdxl_worker.generate.transfers import fetched

QUALITY = 70

# SDXL latents to RGB, one row per colour, and the offsets.
# https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space
_LATENT_TO_RGB = ((60.0, -60.0, 25.0, -70.0), (60.0, -5.0, 15.0, -50.0), (60.0, 10.0, -5.0, -35.0))
_RGB_OFFSET = (150.0, 140.0, 130.0)


class Previews:
    """Makes JPEG data URIs from latents."""

    def begin(self, latents: torch.Tensor) -> Callable[[], str]:
        """Begin a picture of the first of `latents` (n, 4, h, w); what it gives makes the w x h JPEG, in any thread.

        Only asks the device for a copy: waiting for it is left to the other thread.
        """
        copied = fetched(latents[0])
        return lambda: _jpeg(_colours(copied()))


def _colours(latents: torch.Tensor) -> torch.Tensor:
    offset = torch.tensor(_RGB_OFFSET)[:, None, None]
    return torch.einsum("cl,lhw->chw", torch.tensor(_LATENT_TO_RGB), latents.float()) + offset


def _jpeg(colours: torch.Tensor) -> str:
    """`colours` (3, height, width), from 0 to 255, as a data URI."""
    pixels = colours.nan_to_num(0.0).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
