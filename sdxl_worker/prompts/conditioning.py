"""A request's prompts as arguments of a diffusers call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@dataclass(frozen=True)
class Conditioning:
    """What the pictures of one request are conditioned on."""

    prompt: str
    negative_prompt: str | None

    def arguments(self, pictures: int) -> dict[str, Any]:
        """The keyword arguments that give a batch of `pictures` this conditioning.

        A negative prompt of None stays None: SDXL then takes zeros, and not what "" is encoded to
        (`force_zeros_for_empty_prompt` in the model's config).
        """
        negative = None if self.negative_prompt is None else [self.negative_prompt] * pictures
        return {"prompt": [self.prompt] * pictures, "negative_prompt": negative}


@contextlib.contextmanager
def applied(_pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> Iterator[Conditioning]:
    """The request's conditioning, with the pipeline changed as it takes for as long as the context lasts."""
    yield Conditioning(request.prompt, request.negative_prompt)


def unread(pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> list[str]:
    """A sentence for each prompt that is longer than the text encoders read: diffusers cuts it off silently."""
    sentences = []
    limit = pipeline.tokenizer.model_max_length
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        tokens = len(pipeline.tokenizer(text or "", verbose=False).input_ids)
        if tokens > limit:
            # Two of the places are taken by the start and the end of the text.
            sentences.append(f"{name} has {tokens - 2} tokens; the model reads the first {limit - 2}")
    return sentences
