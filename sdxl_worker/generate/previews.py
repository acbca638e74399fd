"""Rough pictures of where a run stands, made beside it: the run waits for none of them."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from sdxl_worker.transfers import fetched, reached

QUALITY = 70
# The longer side of a decoded preview: some 30 kB, which every update carries.
MAX_SIDE = 512
# Latents of 1024 x 1024. Decoding those of a larger picture would take memory that its own run needs.
MAX_LATENTS = 128 * 128

# SDXL latents to RGB, one row per colour, and the offsets.
# https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space
_LATENT_TO_RGB = ((60.0, -60.0, 25.0, -70.0), (60.0, -5.0, 15.0, -50.0), (60.0, 10.0, -5.0, -35.0))
_RGB_OFFSET = (150.0, 140.0, 130.0)


class Previews:
    """Makes JPEG data URIs from latents, with a small VAE (an AutoencoderTiny) or by a formula where there is none.

    The VAE works in a stream of its own, so that the run's kernels queue behind none of its.
    """

    def __init__(self, vae: Any | None = None) -> None:
        self._vae = vae
        self._stream = torch.cuda.Stream(vae.device) if vae is not None and vae.device.type == "cuda" else None

    def begin(self, latents: torch.Tensor) -> Callable[[], str]:
        """Begin a picture of the first of `latents` (n, 4, h, w), which nobody may change any more.

        What it gives makes the JPEG, in any thread: of w x h pixels by the formula, of at most MAX_SIDE by a VAE. Here
        the device is only asked for a copy, or for the moment when the latents are there.
        """
        if self._vae is None:
            copied = fetched(latents[0])
            return lambda: _jpeg(_colours(copied()))
        first, there = latents[:1].detach(), reached(latents.device)
        return lambda: _jpeg(self._decoded(first, there))

    # A thread has its own switch for gradients.
    @torch.no_grad()
    def _decoded(self, latents: torch.Tensor, there: torch.cuda.Event | None) -> torch.Tensor:
        """Colours of one picture's latents; returns when the device has read them."""
        assert self._vae is not None
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            if self._stream is not None and there is not None:
                self._stream.wait_event(there)
            scaled = _bounded(latents).to(self._vae.dtype) / self._vae.config.scaling_factor
            drawn = self._vae.decode(scaled, return_dict=False)[0][0]
            copied = fetched((drawn.float() + 1) * 127.5)
        return copied()


def _bounded(latents: torch.Tensor) -> torch.Tensor:
    height, width = latents.shape[-2:]
    if height * width <= MAX_LATENTS:
        return latents
    share = math.sqrt(MAX_LATENTS / (height * width))
    size = (max(1, int(height * share)), max(1, int(width * share)))
    return torch.nn.functional.interpolate(latents.float(), size=size, mode="area")


def _colours(latents: torch.Tensor) -> torch.Tensor:
    offset = torch.tensor(_RGB_OFFSET)[:, None, None]
    return torch.einsum("cl,lhw->chw", torch.tensor(_LATENT_TO_RGB), latents.float()) + offset


def _jpeg(colours: torch.Tensor) -> str:
    """`colours` (3, height, width), from 0 to 255, as a data URI."""
    pixels = colours.nan_to_num(0.0).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
