"""Render one GenerationRequest with the resident pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker import prompts
from sdxl_worker.errors import GenerationError
from sdxl_worker.generate import samplers, vae
from sdxl_worker.generate.calls import unet_calls
from sdxl_worker.generate.infotext import image_seed
from sdxl_worker.generate.modes import NO_INPUTS, Inputs, Pass, mode_for
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

StepCallback = Callable[[int, int, torch.Tensor], None]
BeforeStep = Callable[[float], None]

# Two pictures of 1024 x 1024: what lora.merge.ACTIVATION_RESERVE leaves room for.
MAX_BATCH_PIXELS = 2 * 1024 * 1024


def render(
    pipeline: StableDiffusionXLPipeline,
    request: GenerationRequest,
    *,
    inputs: Inputs = NO_INPUTS,
    on_step: StepCallback | None = None,
    before_step: BeforeStep | None = None,
    embeddings: prompts.Embeddings = prompts.NO_EMBEDDINGS,
) -> list[Image]:
    """`request.num_images` RGB pictures of request.width x request.height pixels.

    Picture i is drawn with the seed `(request.seed + i) % 2**64`, so each can be asked for again on its own; several
    are drawn at once as far as the memory kept free for it reaches. `inputs` are the pictures (any size) to start
    from, by the request's field; they choose the mode. `embeddings` finds the words of the prompts that have vectors
    of their own. `on_step(step, total_steps, latents)` follows each step, counted over all batches and passes; latents
    are (pictures of the batch, 4, height / 8, width / 8) in the UNet's dtype.
    `before_step(done)` comes before each call of the UNet; `done` is the share of its pass that lies behind, from 0 up
    to below 1. An exception raised in either stops the run and propagates. The pipeline is left as it was. Raises
    GenerationError when a picture holds values that are not finite.
    """
    mode = mode_for(inputs)
    finished = mode.finished(request, inputs)
    if finished is not None:
        return [finished.copy() for _ in range(request.num_images)]
    with ExitStack() as changes:
        changes.enter_context(samplers.applied(pipeline, request))
        changes.enter_context(vae.precision_kept(pipeline))
        conditioning = changes.enter_context(prompts.applied(pipeline, request, embeddings))
        passes = mode.passes(pipeline, request, inputs)
        drawing = _Drawing(pipeline, request, passes, conditioning, on_step, before_step)
        return [mode.completed(picture, request, inputs) for picture in drawing.pictures()]


@dataclass(frozen=True)
class _Drawing:
    """The passes of all batches of one request."""

    pipeline: StableDiffusionXLPipeline
    request: GenerationRequest
    passes: Sequence[Pass]
    conditioning: prompts.Conditioning
    on_step: StepCallback | None
    before_step: BeforeStep | None

    def pictures(self) -> list[Image]:
        """Every picture, one batch after the other."""
        batches = batches_of(self.request)
        calls = [unet_calls(step.view, self._arguments(step)) for step in self.passes] if self.on_step else []
        return [
            picture
            for index, batch in enumerate(batches)
            for picture in self._batch(batch, calls, index * sum(calls), len(batches) * sum(calls))
        ]

    def _batch(self, batch: range, calls: Sequence[int], done: int, total: int) -> list[Image]:
        seeds = [image_seed(self.request, picture) for picture in batch]
        generators = [torch.Generator(self.pipeline.device).manual_seed(seed) for seed in seeds]
        result: torch.Tensor | None = None
        for number, step in enumerate(self.passes):
            samplers.seed(step.view.scheduler, seeds)
            result = self._pass(step, result, generators, done + sum(calls[:number]), total)
        assert result is not None
        return self._as_pictures(result)

    def _arguments(self, step: Pass) -> dict[str, Any]:
        request = self.request
        common = {"num_inference_steps": request.num_inference_steps, "guidance_scale": request.guidance_scale}
        return {**common, "output_type": step.output_type, **step.arguments}

    def _pass(
        self, step: Pass, before: torch.Tensor | None, generators: list[torch.Generator], done: int, total: int
    ) -> torch.Tensor:
        conditioning = step.conditioning or self.conditioning
        # What a pass says itself comes last.
        arguments = {**conditioning.arguments(len(generators)), **self._arguments(step)}
        if step.image is not None:
            assert before is not None
            arguments["image"] = step.image(before)
        before_step = self.before_step if step.has_loras else None
        if self.on_step or before_step:
            arguments["callback_on_step_end"] = self._step_callback(before_step, done, total)
        if before_step:
            before_step(0.0)
        with step.around():
            return step.view(**arguments, generator=generators).images

    def _step_callback(
        self, before_step: BeforeStep | None, done: int, total: int
    ) -> Callable[..., dict[str, torch.Tensor]]:
        def after_step(view: Any, step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if self.on_step:
                self.on_step(done + step + 1, total, tensors["latents"])
            if before_step and step + 1 < view.num_timesteps:
                before_step((step + 1) / view.num_timesteps)
            return {}

        return after_step

    def _as_pictures(self, pixels: torch.Tensor) -> list[Image]:
        if not torch.isfinite(pixels).all():
            raise GenerationError(
                "the picture came out with values that are not numbers; try another seed, scale or VAE"
            )
        processor = self.pipeline.image_processor
        return processor.numpy_to_pil(processor.pt_to_numpy(pixels))


def batches_of(request: GenerationRequest) -> list[range]:
    """The indices of the pictures that are drawn together."""
    size = max(1, MAX_BATCH_PIXELS // (request.width * request.height))
    everything = range(request.num_images)
    return [everything[start : start + size] for start in range(0, request.num_images, size)]
