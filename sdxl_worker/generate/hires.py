"""The second pass of `hires`: the picture is enlarged, noised and drawn again at its new size, as A1111's hires fix.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/processing.py, sample_hr_pass
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from sdxl_worker.generate.images import pictures_in
from sdxl_worker.generate.modes import Pass, view_of
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def with_second_pass(
    pipeline: StableDiffusionXLPipeline, request: GenerationRequest, passes: Sequence[Pass]
) -> list[Pass]:
    """`passes`, and the one over what the last of them draws that `request.hires` asks for, if it asks for one."""
    hires = request.hires
    if hires is None:
        return list(passes)
    *before, first = passes
    size = request.final_size
    if hires.upscaler == "latent":
        first = first.giving_latents()
    second = Pass(
        view_of(pipeline, "StableDiffusionXLImg2ImgPipeline"),
        {"num_inference_steps": hires.schedule(hires.steps or request.num_inference_steps), "strength": hires.strength},
        image=lambda batch: _UPSCALERS[hires.upscaler](batch, size),
        seeds_anew=True,
    )
    return [*before, first, second]


def enlarged_latents(latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`latents` (n, 4, h, w) for pictures of `size`, width and height in pixels: A1111's upscaler "Latent"."""
    width, height = size
    scaled = torch.nn.functional.interpolate(latents.float(), size=(height // 8, width // 8), mode="bilinear")
    return scaled.to(latents.dtype)


def enlarged_pixels(pixels: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures in `pixels` (n, 3, h, w), 0 to 1, at `size`, width and height: A1111's upscaler "Lanczos"."""
    return [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures_in(pixels)]


_UPSCALERS = {"latent": enlarged_latents, "lanczos": enlarged_pixels}
