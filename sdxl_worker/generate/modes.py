"""The ways to render, in one table: what each needs, and the passes of diffusers pipelines that it makes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.generate import inpaint
from sdxl_worker.generate.checkpoint_facts import INPAINTING_CHANNELS
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from sdxl_worker.prompts import Conditioning

# The pictures that a request's fields led to, by the name of the field.
Inputs = Mapping[str, Image.Image]
NO_INPUTS: Inputs = MappingProxyType({})


@dataclass(frozen=True)
class Pass:
    """One call of a diffusers pipeline, made for each batch of pictures.

    `view` is that pipeline; `arguments` are those of the call beside prompts and generators, and override the request's
    steps and guidance. `image` makes this argument from what the pass before gave, the batch in its `output_type`,
    "latent" or "pt"; the first pass has none. `conditioning` is this pass's own, where it has other text encoders than
    the rest. `around` is entered for the call, and left again whatever happens; it takes `device_bytes` of the device's
    memory. `has_loras` says whether LoRAs reach the view's weights. `goes_on`: its steps are the end of the run
    that the pass before began. `guided_steps` are those after which there is no more guidance, None = the arguments'
    guidance to the end. `seeds_anew` gives the call fresh generators of the pictures' seeds, instead of those that the
    pass before has drawn from.
    """

    view: Any
    arguments: Mapping[str, Any]
    image: Callable[[torch.Tensor], Any] | None = None
    output_type: str = "pt"
    conditioning: Conditioning | None = None
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    device_bytes: int = 0
    has_loras: bool = True
    goes_on: bool = False
    guided_steps: int | None = None
    seeds_anew: bool = False

    def giving_latents(self, denoising_end: float | None = None) -> Pass:
        """The same up to its latents, or up to those with the last share of the noise still in them."""
        end = {} if denoising_end is None else {"denoising_end": denoising_end}
        return dataclasses.replace(self, arguments={**self.arguments, **end}, output_type="latent")


def _draws_always(_request: GenerationRequest, _inputs: Inputs) -> Image.Image | None:
    return None


def _as_drawn(picture: Image.Image, _request: GenerationRequest, _inputs: Inputs) -> Image.Image:
    return picture


@dataclass(frozen=True)
class Mode:
    """One way to render.

    `needs` are the request's fields whose pictures it starts from; `class_name` is the diffusers pipeline that it runs
    on the resident components; `arguments` are those of the call beside prompts, seeds and steps; `finished` gives the
    picture where there is nothing to denoise, else None; `completed` makes a drawn picture the answer's.
    """

    needs: frozenset[str]
    class_name: str
    arguments: Callable[[GenerationRequest, Inputs], dict[str, Any]]
    finished: Callable[[GenerationRequest, Inputs], Image.Image | None] = _draws_always
    completed: Callable[[Image.Image, GenerationRequest, Inputs], Image.Image] = _as_drawn

    def passes(
        self, pipeline: StableDiffusionXLPipeline, request: GenerationRequest, inputs: Inputs = NO_INPUTS
    ) -> list[Pass]:
        """The calls that make a batch of pictures, in order; the last one gives pixels."""
        return [Pass(view_of(pipeline, self.class_name), self.arguments(request, inputs))]


def view_of(pipeline: StableDiffusionXLPipeline, class_name: str) -> Any:
    """The diffusers pipeline of that class on the resident components: no second copy of any weight."""
    import diffusers

    if type(pipeline).__name__ == class_name:
        return pipeline
    view = getattr(diffusers, class_name)(
        **pipeline.components,
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        add_watermarker=pipeline.watermark is not None,
    )
    view.set_progress_bar_config(disable=True)
    return view


def mode_for(inputs: Inputs) -> Mode:
    """The mode that needs exactly these pictures; raises KeyError when there is none."""
    return MODES[frozenset(inputs)]


def check_model(pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> None:
    """Raise InvalidRequest for what the base model cannot draw: an inpainting checkpoint wants a picture and a mask."""
    if pipeline.unet.config.in_channels == INPAINTING_CHANNELS and not request.is_inpainting:
        raise InvalidRequest(
            "this worker's base model is an inpainting checkpoint: it needs image_url, and mask_url or extend"
        )


def plain_inputs(pipeline: Any, width: int, height: int) -> Inputs:
    """The pictures to draw anything with: an inpainting checkpoint does not without a picture and a mask."""
    if pipeline.unet.config.in_channels != INPAINTING_CHANNELS:
        return NO_INPUTS
    size = (width, height)
    return {"image_url": Image.new("RGB", size, "gray"), "mask_url": Image.new("L", size, 255)}


def fitted(image: Image.Image, request: GenerationRequest) -> Image.Image:
    """`image` (any mode and size) as RGB, scaled and cropped in its middle to the request's width and height."""
    size = (request.width, request.height)
    return ImageOps.fit(image.convert("RGB"), size, method=Image.Resampling.LANCZOS)


def _text_arguments(request: GenerationRequest, _inputs: Inputs) -> dict[str, Any]:
    return {"height": request.height, "width": request.width}


def _image_arguments(request: GenerationRequest, inputs: Inputs) -> dict[str, Any]:
    return {"image": fitted(inputs["image_url"], request), "strength": request.denoising_strength}


def _image_finished(request: GenerationRequest, inputs: Inputs) -> Image.Image | None:
    return fitted(inputs["image_url"], request) if request.denoising_strength == 0 else None


_ALL = (
    Mode(frozenset(), "StableDiffusionXLPipeline", _text_arguments),
    Mode(frozenset({"image_url"}), "StableDiffusionXLImg2ImgPipeline", _image_arguments, _image_finished),
    Mode(
        frozenset({"image_url", "mask_url"}),
        "StableDiffusionXLInpaintPipeline",
        inpaint.arguments,
        inpaint.finished,
        inpaint.completed,
    ),
)
MODES: Mapping[frozenset[str], Mode] = MappingProxyType({mode.needs: mode for mode in _ALL})
