"""Pictures to compare, and the ones that diffusers draws when it is called as its documentation shows."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image


def same(first: Image.Image, second: Image.Image) -> bool:
    """True when the two have the same pixels."""
    return np.array_equal(np.asarray(first), np.asarray(second))


def farthest(first: Image.Image, second: Image.Image) -> int:
    """The largest difference of a channel's value, of 255."""
    return int(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max())


def by_diffusers(pipeline: Any, scheduler_class: str, *, seeds: tuple[int, ...] = (11,), **arguments: Any) -> list:
    """The pictures of `pipeline(**arguments)` with a fresh scheduler of that class; the resident one is put back."""
    resident = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, scheduler_class).from_config(resident.config)
    try:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(generator=generator, **arguments).images
    finally:
        pipeline.scheduler = resident


def inpainting(pipeline: Any) -> Any:
    """Diffusers' inpainting pipeline on the components of `pipeline`."""
    view = diffusers.StableDiffusionXLInpaintPipeline.from_pipe(pipeline)
    view.set_progress_bar_config(disable=True)
    return view


def image_to_image(pipeline: Any) -> Any:
    """Diffusers' image-to-image pipeline on the components of `pipeline`."""
    view = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    view.set_progress_bar_config(disable=True)
    return view
