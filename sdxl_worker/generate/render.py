"""Render one GenerationRequest with the resident pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from sdxl_worker import prompts
from sdxl_worker.errors import GenerationError
from sdxl_worker.generate import samplers, vae
from sdxl_worker.generate.batches import MAX_BATCH_PIXELS, Steps, in_batches, most_at_once
from sdxl_worker.generate.calls import unet_calls
from sdxl_worker.generate.deep_cache import DeepCache
from sdxl_worker.generate.guidance import call_without_guidance, with_guidance_ending
from sdxl_worker.generate.hires import with_second_pass
from sdxl_worker.generate.images import pictures_in
from sdxl_worker.generate.infotext import image_seed
from sdxl_worker.generate.modes import NO_INPUTS, Inputs, Pass, mode_for
from sdxl_worker.generate.refiner import Refining
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

StepCallback = Callable[[int, int, torch.Tensor], None]
BeforeStep = Callable[[float], bool | None]


def render(
    pipeline: StableDiffusionXLPipeline,
    request: GenerationRequest,
    *,
    inputs: Inputs = NO_INPUTS,
    on_step: StepCallback | None = None,
    before_step: BeforeStep | None = None,
    embeddings: prompts.Embeddings = prompts.NO_EMBEDDINGS,
    refining: Refining | None = None,
) -> list[Image]:
    """`request.num_images` RGB pictures of `request.final_size` pixels.

    Picture i is the one of its `image_seed` and prompt, so each can be asked for again on its own; several are drawn at
    once as far as the free memory reaches, and fewer where that was too many. `inputs` are the pictures to start from,
    as `fetch_inputs` gives them; they choose the mode. `embeddings` finds the words of the prompts that have vectors of
    their own. `refining` is the refiner's part, made ready before LoRAs were merged.
    `on_step(step, total_steps, latents)` follows each step, counted over all batches and passes and never falling;
    latents are (pictures of the batch, 4, height / 8, width / 8) in the UNet's dtype.
    `before_step(done)` comes before each call of the base model's UNet; `done` is the share of its pass's steps that
    lies behind, from 0 up to below 1: of a step that calls it twice, both calls get the same. True says that it
    changed the weights. An exception raised in either stops the run and propagates. The pipeline is left as it was.
    Raises GenerationError when a picture holds values that are not finite.
    """
    mode = mode_for(inputs)
    finished = mode.finished(request, inputs)
    if finished is not None:
        return [finished.copy() for _ in range(request.num_images)]
    with ExitStack() as changes:
        changes.enter_context(samplers.applied(pipeline, request))
        changes.enter_context(vae.tiled_where_large(pipeline))
        conditioning = changes.enter_context(prompts.applied(pipeline, request, embeddings))
        passes = with_second_pass(pipeline, request, mode.passes(pipeline, request, inputs))
        if refining is not None:
            changes.enter_context(samplers.applied(refining.refiner.pipeline, request))
            passes = refining.passes(passes, request, inputs)
        guidance_ends = request.cfg_end < 1 < request.guidance_scale
        counted = passes if on_step or guidance_ends else ()
        calls = [unet_calls(step.view, _arguments(request, step)) for step in counted]
        if guidance_ends:
            passes = with_guidance_ending(passes, calls, request.cfg_end)
        drawing = _Drawing(pipeline, request, passes, conditioning, sum(calls), on_step, before_step)
        return [mode.completed(picture, request, inputs) for picture in drawing.pictures()]


@dataclass(frozen=True)
class _Drawing:
    """The passes of all batches of one request; `calls` are those of the UNet for one batch, counted for `on_step`."""

    pipeline: StableDiffusionXLPipeline
    request: GenerationRequest
    passes: Sequence[Pass]
    conditioning: prompts.Conditioning
    calls: int
    on_step: StepCallback | None
    before_step: BeforeStep | None

    def pictures(self) -> list[Image]:
        """Every picture, one batch after the other."""
        pixels = math.prod(self.request.final_size)
        steps = Steps(self.calls)

        def draw(batch: Sequence[int], later: int) -> list[Image]:
            steps.begin(later)
            with vae.kept(self.pipeline, one_by_one=len(batch) * pixels > MAX_BATCH_PIXELS):
                return self._batch(batch, steps)

        reserved = max(step.device_bytes for step in self.passes)
        return in_batches(self._forms(), most_at_once(self.pipeline.device, pixels, reserved), draw)

    def _forms(self) -> list[Hashable]:
        """For each picture what has to be equal for all that are drawn together."""
        all_of_them = [step.conditioning or self.conditioning for step in self.passes]
        return [tuple(one.form(index) for one in all_of_them) for index in range(self.request.num_images)]

    def _batch(self, batch: Sequence[int], steps: Steps) -> list[Image]:
        seeds = [image_seed(self.request, picture) for picture in batch]
        generators = self._generators(seeds)
        result: torch.Tensor | None = None
        for step in self.passes:
            if step.seeds_anew:
                generators = self._generators(seeds)
            samplers.seed(step.view.scheduler, seeds)
            result = self._pass(step, result, batch, generators, steps)
        assert result is not None
        return pictures_in(result)

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator(self.pipeline.device).manual_seed(seed) for seed in seeds]

    def _pass(
        self,
        step: Pass,
        before: torch.Tensor | None,
        batch: Sequence[int],
        generators: list[torch.Generator],
        steps: Steps,
    ) -> torch.Tensor:
        conditioning = step.conditioning or self.conditioning
        # What a pass says itself comes last.
        arguments = {**conditioning.arguments(batch), **_for_each(_arguments(self.request, step), len(batch))}
        if step.image is not None:
            assert before is not None
            arguments["image"] = step.image(before)
        before_step = self.before_step if step.has_loras else None
        if step.guided_steps is not None:
            arguments["callback_on_step_end_tensor_inputs"] = step.view._callback_tensor_inputs
        cache = DeepCache(self.request.deep_cache) if self.request.deep_cache > 1 else None
        if self.on_step or before_step or cache or step.guided_steps is not None:
            arguments["callback_on_step_end"] = self._step_callback(step, before_step, cache, steps)
        if before_step:
            before_step(0.0)
        with step.around(), cache.on(step.view.unet) if cache else nullcontext():
            drawn = step.view(**arguments, generator=generators).images
        # Of every pass: once they are whole numbers, values that are not finite would be a colour like any other.
        if not torch.isfinite(drawn).all():
            raise GenerationError(
                "the picture came out with values that are not numbers; try another seed, scale or VAE"
            )
        return drawn

    def _step_callback(
        self, this: Pass, before_step: BeforeStep | None, cache: DeepCache | None, steps: Steps
    ) -> Callable[..., dict[str, torch.Tensor]]:
        def after_call(view: Any, call: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.done += 1
            if self.on_step:
                self.on_step(steps.done, steps.total, tensors["latents"])
            if call + 1 == view.num_timesteps:
                return {}
            # A scheduler of order 2 goes through each step but the last in two calls, one after the other.
            order = view.scheduler.order
            step, is_second = divmod(call + 1, order)
            count = -(-view.num_timesteps // order)
            changed = before_step(step / count) if before_step else False
            if cache and not is_second:
                cache.begin_step(step, count, anew=bool(changed))
            return call_without_guidance(view, tensors) if step == this.guided_steps and not is_second else {}

        return after_call


def _arguments(request: GenerationRequest, step: Pass) -> dict[str, Any]:
    """Those of the pass's call beside prompts, pictures and generators."""
    guidance = {"guidance_scale": request.guidance_scale, "guidance_rescale": request.guidance_rescale}
    common = {**samplers.call_arguments(request), **guidance, "output_type": step.output_type}
    if "num_inference_steps" in step.arguments:
        # A list is for the steps that the request has.
        common.pop("timesteps", None)
    return {**common, **step.arguments}


def _for_each(arguments: dict[str, Any], pictures: int) -> dict[str, Any]:
    """The arguments with each picture among them given once for every picture of the batch.

    Else StableDiffusionXLInpaintPipeline encodes it once, with noise of the first generator alone: the second picture
    would not be that of its seed.
    """
    return {name: [value] * pictures if isinstance(value, Image) else value for name, value in arguments.items()}
