"""A request's prompts as arguments of a diffusers call, and what to tell about them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
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
    """What the pictures of one request are conditioned on.

    `prompts` are a diffusers call's arguments for one picture: once for all, or one for each picture.
    """

    prompts: Sequence[Mapping[str, str | torch.Tensor | None]]

    def of(self, picture: int) -> Mapping[str, str | torch.Tensor | None]:
        """The arguments for the picture with that index."""
        return self.prompts[picture if len(self.prompts) > 1 else 0]

    def form(self, picture: int) -> Hashable:
        """What is equal for pictures that one call can draw: the arguments' names, and the tensors' shapes."""
        return tuple((name, getattr(value, "shape", None)) for name, value in self.of(picture).items())

    def arguments(self, pictures: Sequence[int]) -> dict[str, Any]:
        """The keyword arguments of a call that draws these pictures, which have the same form."""
        each = [self.of(picture) for picture in pictures]
        return {name: _together([values[name] for values in each]) for name in each[0]}


def _together(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return None if values[0] is None else values


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
    prompts, negative = read_prompts(request, tokenizers, embeddings)
    other = None if negative is None else negative.as_stock
    for_stock = request.clip_skip == DEFAULT_CLIP_SKIP and (negative is None or other is not None)
    texts = [prompt.as_stock if for_stock else None for prompt in prompts]
    others = [prompt for prompt, text in zip(prompts, texts, strict=True) if text is None]
    encoded = iter(_encoded(pipeline, request, others, negative, embeddings) if others else ())
    yield Conditioning(
        [next(encoded) if text is None else {"prompt": text, "negative_prompt": other} for text in texts]
    )


def encoded_now(
    pipeline: StableDiffusionXLPipeline, request: GenerationRequest, embeddings: Embeddings = NO_EMBEDDINGS
) -> Conditioning:
    """The request's conditioning by the text encoders as they are now, whatever is done to them later.

    Raises InvalidRequest.
    """
    prompts, negative = read_prompts(request, tokenizers_of(pipeline), embeddings)
    return Conditioning(_encoded(pipeline, request, prompts, negative, embeddings))


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
    pipeline: StableDiffusionXLPipeline,
    request: GenerationRequest,
    prompts: Sequence[ReadPrompt],
    negative: ReadPrompt | None,
    embeddings: Embeddings,
) -> list[Mapping[str, torch.Tensor]]:
    """Each prompt and the negative one in the same length: the least common multiple of their chunks."""
    if negative is None and not pipeline.config.force_zeros_for_empty_prompt:
        negative = read("", "plain", tokenizers_of(pipeline), embeddings)
    every = prompts if negative is None else [*prompts, negative]
    encoded = encode(pipeline, every, request.prompt_emphasis, request.clip_skip)
    return [_pair(positive, None if negative is None else encoded[-1]) for positive in encoded[: len(prompts)]]


def _pair(positive: Encoded, negative: Encoded | None) -> Mapping[str, torch.Tensor]:
    if negative is None:
        negative = positive.zeroed()
    length = math.lcm(positive.places, negative.places)
    positive, negative = (one.repeated(length // one.places) for one in (positive, negative))
    return {
        "prompt_embeds": positive.states,
        "pooled_prompt_embeds": positive.pooled,
        "negative_prompt_embeds": negative.states,
        "negative_pooled_prompt_embeds": negative.pooled,
    }
