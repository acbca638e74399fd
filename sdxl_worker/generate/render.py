"""Render one GenerationRequest with the resident pipeline."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker.errors import GenerationError
from sdxl_worker.generate.samplers import make_scheduler
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    from PIL.Image import Image

logger = logging.getLogger(__name__)

StepCallback = Callable[[int, int, torch.Tensor], None]


def render(
    pipeline: StableDiffusionXLPipeline,
    request: GenerationRequest,
    *,
    init_image: Image | None = None,
    on_step: StepCallback | None = None,
) -> list[Image]:
    """`request.num_images` RGB pictures of request.width x request.height pixels.

    Picture i is drawn with the seed `(request.seed + i) % 2**64`, so each can be asked for again on its own.
    With `init_image` (any size; cropped to the request's shape) the run is image-to-image on the same weights.
    `on_step(step, total_steps, latents)` follows each step, latents being (num_images, 4, height / 8, width / 8) in
    the UNet's dtype; an exception raised in it stops the run and propagates. The pipeline's scheduler is put back.
    Raises GenerationError when the pictures hold values that are not finite.
    """
    arguments: dict[str, Any] = {
        "prompt": [request.prompt] * request.num_images,
        "negative_prompt": [request.negative_prompt] * request.num_images,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": [
            torch.Generator(pipeline.device).manual_seed((request.seed + index) % 2**64)
            for index in range(request.num_images)
        ],
        "output_type": "pt",
    }
    if on_step is not None:
        arguments["callback_on_step_end"] = _step_callback(on_step)
    with _resident_parts(pipeline, request.scheduler):
        runner: Any = pipeline
        if init_image is not None:
            runner = _image_to_image(pipeline)
            arguments |= {"image": _fit(init_image, request), "strength": request.strength}
        else:
            arguments |= {"height": request.height, "width": request.width}
        pixels = runner(**arguments).images
    if not torch.isfinite(pixels).all():
        raise GenerationError("the picture came out with values that are not numbers; try another seed, scale or VAE")
    processor = pipeline.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(pixels))


def unread_prompt(pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> list[str]:
    """A sentence for each prompt that is longer than the text encoders read: diffusers cuts it off silently."""
    sentences = []
    for name in ("prompt", "negative_prompt"):
        tokens = len(pipeline.tokenizer(getattr(request, name), verbose=False).input_ids)
        limit = pipeline.tokenizer.model_max_length
        if tokens > limit:
            # Two of the places are taken by the start and the end of the text.
            sentences.append(f"{name} has {tokens - 2} tokens; the model reads the first {limit - 2}")
    return sentences


def _step_callback(on_step: StepCallback) -> Callable[..., dict[str, torch.Tensor]]:
    def after_step(runner: Any, step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        on_step(step + 1, runner.num_timesteps, tensors["latents"])
        return {}

    return after_step


@contextlib.contextmanager
def _resident_parts(pipeline: StableDiffusionXLPipeline, scheduler_name: str) -> Iterator[None]:
    """Render with the request's scheduler, and leave scheduler and VAE as they were whatever happens."""
    scheduler, vae_dtype = pipeline.scheduler, pipeline.vae.dtype
    pipeline.scheduler = make_scheduler(scheduler_name, scheduler.config)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        # A VAE that overflows in float16 is decoded in float32; an error in there leaves it so. The way back is exact.
        if pipeline.vae.dtype != vae_dtype:
            pipeline.vae.to(vae_dtype)


def _image_to_image(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """A view of the resident components: no second copy of any weight."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    view = StableDiffusionXLImg2ImgPipeline(
        **pipeline.components,
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        add_watermarker=pipeline.watermark is not None,
    )
    view.set_progress_bar_config(disable=True)
    return view


def _fit(image: Image, request: GenerationRequest) -> Image:
    from PIL import Image as PillowImage
    from PIL import ImageOps

    size = (request.width, request.height)
    return ImageOps.fit(image.convert("RGB"), size, method=PillowImage.Resampling.LANCZOS)
