"""Changes of the VAE that last for one batch of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@contextlib.contextmanager
def kept(pipeline: StableDiffusionXLPipeline, *, one_by_one: bool = False) -> Iterator[None]:
    """Put the VAE back into its dtype: one that overflows in float16 is decoded in float32, and an error leaves it so.

    The way back is exact. With `one_by_one` it takes the pictures of a batch one after the other, in the memory that
    one of them takes.
    """
    dtype, slices = pipeline.vae.dtype, pipeline.vae.use_slicing
    pipeline.vae.use_slicing = slices or one_by_one
    try:
        yield
    finally:
        pipeline.vae.use_slicing = slices
        if pipeline.vae.dtype != dtype:
            pipeline.vae.to(dtype)
