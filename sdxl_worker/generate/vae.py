"""Changes of the VAE that last for one batch of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_worker.generate.tiled_vae import tiled
from sdxl_worker.request import MAX_SIDE

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

# What a request can ask for in one pass. The largest tensor of decoding it has 256 values for each pixel: a billion, or
# 2 GB in half precision, and several of that size are there at once. Some kernels count to two billion only.
MAX_WHOLE_PIXELS = MAX_SIDE * MAX_SIDE


@contextlib.contextmanager
def tiled_where_large(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Let the VAE work tile by tile on pictures of more than MAX_WHOLE_PIXELS, and be as it was afterwards."""
    with tiled(pipeline.vae, MAX_WHOLE_PIXELS):
        yield


@contextlib.contextmanager
def kept(pipeline: StableDiffusionXLPipeline, *, one_by_one: bool = False) -> Iterator[None]:
    """Put the VAE back into its dtype: one that overflows in float16 is decoded in float32, and an error leaves it so.

    Its own weights wait meanwhile: with no memory left there would be none to cast them back. With `one_by_one` it
    takes the pictures of a batch one after the other, in the memory that one of them takes.
    """
    weights, slices = [(weight, weight.data) for weight in pipeline.vae.parameters()], pipeline.vae.use_slicing
    pipeline.vae.use_slicing = slices or one_by_one
    try:
        yield
    finally:
        pipeline.vae.use_slicing = slices
        for weight, data in weights:
            if weight.data_ptr() != data.data_ptr():
                weight.data = data
