"""Changes of the VAE that last for one request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@contextlib.contextmanager
def precision_kept(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Put the VAE back into its dtype: one that overflows in float16 is decoded in float32, and an error leaves it so.

    The way back is exact.
    """
    dtype = pipeline.vae.dtype
    try:
        yield
    finally:
        if pipeline.vae.dtype != dtype:
            pipeline.vae.to(dtype)
