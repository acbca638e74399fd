"""Render one GenerationRequest with the resident pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker import prompts
from sdxl_worker.errors import GenerationError
from sdxl_worker.generate import samplers, vae
from sdxl_worker.generate.infotext import image_seed
from sdxl_worker.generate.modes import mode_for
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

StepCallback = Callable[[int, int, torch.Tensor], None]

# Two pictures of 1024 x 1024: what lora.merge.ACTIVATION_RESERVE leaves room for.
MAX_BATCH_PIXELS = 2 * 1024 * 1024


def render(
    pipeline: StableDiffusionXLPipeline,
    request: GenerationRequest,
    *,
    init_image: Image | None = None,
    on_step: StepCallback | None = None,
    embeddings: prompts.Embeddings = prompts.NO_EMBEDDINGS,
) -> list[Image]:
    """`request.num_images` RGB pictures of request.width x request.height pixels.

    Picture i is drawn with the seed `(request.seed + i) % 2**64`, so each can be asked for again on its own; several
    are drawn at once as far as the memory kept free for it reaches. With `init_image` (any size; cropped to the
    request's shape) the run is image-to-image on the same weights, and strength 0 gives that picture back.
    `embeddings` finds the words of the prompts that have vectors of their own.
    `on_step(step, total_steps, latents)` follows each step, counted over all batches; latents are
    (pictures of the batch, 4, height / 8, width / 8) in the UNet's dtype. An exception raised in it stops the run and
    propagates. The pipeline is left as it was. Raises GenerationError when a picture holds values that are not finite.
    """
    inputs = {} if init_image is None else {"image_url": init_image}
    mode = mode_for(inputs)
    finished = mode.finished(request, inputs)
    if finished is not None:
        return [finished.copy() for _ in range(request.num_images)]
    with ExitStack() as changes:
        changes.enter_context(samplers.applied(pipeline, request.scheduler))
        changes.enter_context(vae.precision_kept(pipeline))
        conditioning = changes.enter_context(prompts.applied(pipeline, request, embeddings))
        call = functools.partial(
            mode.view(pipeline),
            **mode.arguments(request, inputs),
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            output_type="pt",
        )
        return _draw(pipeline, call, request, conditioning, on_step)


def _draw(
    pipeline: StableDiffusionXLPipeline,
    call: Callable[..., Any],
    request: GenerationRequest,
    conditioning: prompts.Conditioning,
    on_step: StepCallback | None,
) -> list[Image]:
    """Every picture, one batch after the other; `call` is the diffusers pipeline with what all batches share."""
    pictures: list[Image] = []
    batches = batches_of(request)
    for index, batch in enumerate(batches):
        arguments = conditioning.arguments(len(batch))
        if on_step is not None:
            arguments["callback_on_step_end"] = _step_callback(on_step, index, len(batches))
        seeds = [image_seed(request, picture) for picture in batch]
        generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
        pictures += _as_pictures(pipeline, call(**arguments, generator=generators).images)
    return pictures


def batches_of(request: GenerationRequest) -> list[range]:
    """The indices of the pictures that are drawn together."""
    size = max(1, MAX_BATCH_PIXELS // (request.width * request.height))
    everything = range(request.num_images)
    return [everything[start : start + size] for start in range(0, request.num_images, size)]


def _as_pictures(pipeline: StableDiffusionXLPipeline, pixels: torch.Tensor) -> list[Image]:
    if not torch.isfinite(pixels).all():
        raise GenerationError("the picture came out with values that are not numbers; try another seed, scale or VAE")
    processor = pipeline.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(pixels))


def _step_callback(on_step: StepCallback, batch: int, batches: int) -> Callable[..., dict[str, torch.Tensor]]:
    def after_step(view: Any, step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps = view.num_timesteps
        on_step(batch * steps + step + 1, batches * steps, tensors["latents"])
        return {}

    return after_step
