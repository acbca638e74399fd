"""A request's prompts as arguments of a diffusers call, and what to tell about them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker.prompts.encode import Encoded, check_layer, encode
from sdxl_worker.prompts.notes import notes_on
from sdxl_worker.prompts.reading import ReadPrompt, read, read_prompts, tokenizers_of
from sdxl_worker.prompts.vectors import NO_EMBEDDINGS, Embeddings
from sdxl_worker.request import DEFAULT_CLIP_SKIP, GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@dataclass(frozen=True)
class Conditioning:
    """What the pictures of one request are conditioned on: a diffusers call's arguments, each for one picture."""

    values: Mapping[str, str | torch.Tensor | None]

    def arguments(self, pictures: int) -> dict[str, Any]:
        """The keyword arguments that give a batch of `pictures` this conditioning."""
        return {name: _times(value, pictures) for name, value in self.values.items()}


def _times(value: str | torch.Tensor | None, pictures: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat(pictures, *[1] * (value.ndim - 1))
    return None if value is None else [value] * pictures


@contextlib.contextmanager
def applied(
    pipeline: StableDiffusionXLPipeline, request: GenerationRequest, embeddings: Embeddings = NO_EMBEDDINGS
) -> Iterator[Conditioning]:
    """The request's conditioning, with the pipeline changed as it takes for as long as the context lasts.

    Prompts that diffusers reads the same way are left to it, to the bit. A negative prompt of None stays None: SDXL
    then takes zeros, and not what "" is encoded to (`force_zeros_for_empty_prompt` in the model's config). Has to be
    entered when the LoRAs are in place: the text encoders' count. Raises InvalidRequest.
    """
    tokenizers = tokenizers_of(pipeline)
    prompt, negative = read_prompts(request, tokenizers, embeddings)
    as_stock = {"prompt": prompt.as_stock, "negative_prompt": None if negative is None else negative.as_stock}
    both_stock = as_stock["prompt"] is not None and (negative is None or as_stock["negative_prompt"] is not None)
    if both_stock and request.clip_skip == DEFAULT_CLIP_SKIP:
        yield Conditioning(as_stock)
        return
    if negative is None and not pipeline.config.force_zeros_for_empty_prompt:
        negative = read("", "plain", tokenizers, embeddings)
    positive, other = _encoded(pipeline, request, prompt, negative)
    yield Conditioning(
        {
            "prompt_embeds": positive.states,
            "pooled_prompt_embeds": positive.pooled,
            "negative_prompt_embeds": other.states,
            "negative_pooled_prompt_embeds": other.pooled,
        }
    )


def examined(
    pipeline: StableDiffusionXLPipeline, request: GenerationRequest, embeddings: Embeddings = NO_EMBEDDINGS
) -> list[str]:
    """A sentence for each thing in the prompts that has no effect, or not the one that it looks like.

    Raises InvalidRequest, as `applied` would, before anything is downloaded or changed.
    """
    check_layer(pipeline, request.clip_skip)
    tokenizers = tokenizers_of(pipeline)
    read_prompts(request, tokenizers, embeddings)
    return notes_on(request, tokenizers, embeddings)


def _encoded(
    pipeline: StableDiffusionXLPipeline, request: GenerationRequest, prompt: ReadPrompt, negative: ReadPrompt | None
) -> tuple[Encoded, Encoded]:
    """Both prompts, in the same length: the least common multiple of their chunks."""
    both = [prompt] if negative is None else [prompt, negative]
    positive, *rest = encode(pipeline, both, request.prompt_emphasis, request.clip_skip)
    if negative is None:
        return positive, positive.zeroed()
    length = math.lcm(prompt.length, negative.length)
    return positive.repeated(length // prompt.length), rest[0].repeated(length // negative.length)
