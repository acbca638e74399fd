"""What the text encoders make of prompts that were read, with the weights of their tokens applied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.chunks import Chunk
from sdxl_worker.prompts.emphasis import RULES
from sdxl_worker.prompts.reading import ReadPrompt, tokenizers_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

# The hidden states of every layer are there at once: with 8 chunks 52 MB in the larger encoder, in float16.
CHUNKS_AT_ONCE = 8


@dataclass(frozen=True)
class Encoded:
    """A prompt as the UNet reads it: states (1, 77 x chunks, all encoders' widths) and pooled (1, projection)."""

    states: torch.Tensor
    pooled: torch.Tensor

    @property
    def places(self) -> int:
        """How many tokens' places it has: 77 for each chunk."""
        return self.states.shape[1]

    def repeated(self, times: int) -> Encoded:
        """The same to the UNet, in a longer form: attention over repeated keys equals attention over the keys."""
        return Encoded(self.states.repeat(1, times, 1), self.pooled)

    def zeroed(self) -> Encoded:
        """Zeros of the same shapes."""
        return Encoded(torch.zeros_like(self.states), torch.zeros_like(self.pooled))


@torch.no_grad()
def encode(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[ReadPrompt], emphasis: str = "original", clip_skip: int = 2
) -> list[Encoded]:
    """Each prompt's hidden states of layer -clip_skip, weighted by the rule `emphasis`, and its pooled state.

    The pooled state is the second encoder's, of the first chunk, and knows no weights. Raises InvalidRequest when
    the encoders have no such layer, or the weights lead out of the range of the encoders' dtype.
    """
    check_layer(pipeline, clip_skip)
    dtype = pipeline.text_encoder_2.dtype
    states = []
    pooled = torch.empty(0)
    for name, tokenizer in tokenizers_of(pipeline).items():
        encoder = getattr(pipeline, name)
        chunks = [chunk for prompt in prompts for chunk in prompt.chunks[name]]
        found, pooled = _states(encoder, tokenizer, chunks, clip_skip)
        states.append(_weighted(found, chunks, emphasis, encoder, tokenizer, clip_skip).to(dtype))
    together = torch.cat(states, dim=-1)
    results, start = [], 0
    for prompt in prompts:
        part = together[start : start + prompt.length]
        results.append(Encoded(part.reshape(1, -1, part.shape[-1]), pooled[start : start + 1].to(dtype)))
        start += prompt.length
    return results


def check_layer(pipeline: StableDiffusionXLPipeline, clip_skip: int) -> None:
    """Raise InvalidRequest when one of the text encoders has no layer -clip_skip."""
    # The states before the first layer are one more choice.
    encoders = (getattr(pipeline, name) for name in tokenizers_of(pipeline))
    deepest = 1 + min(encoder.config.num_hidden_layers for encoder in encoders)
    if clip_skip > deepest:
        raise InvalidRequest(f"clip_skip must be at most {deepest} with this model, not {clip_skip}")


def _states(encoder: Any, tokenizer: Any, chunks: Sequence[Chunk], clip_skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (chunks, 77, width), and the encoder's first output, which is the pooled state where it has one."""
    states, first = [], []
    for start in range(0, len(chunks), CHUNKS_AT_ONCE):
        batch = chunks[start : start + CHUNKS_AT_ONCE]
        ids = torch.tensor([chunk.ids(tokenizer) for chunk in batch], device=encoder.device)
        with vectors_in_place(encoder, batch):
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-clip_skip])
        first.append(output[0])
    return torch.cat(states), torch.cat(first)


@contextlib.contextmanager
def vectors_in_place(encoder: Any, batch: Sequence[Chunk]) -> Iterator[None]:
    """Give the chunks' vectors out as the token embeddings of their places, for the next call of the encoder."""
    placed = [(row, place, vectors) for row, chunk in enumerate(batch) for place, vectors in chunk.vectors()]
    if not placed:
        yield
        return

    def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for row, place, vectors in placed:
            output[row, place : place + len(vectors.values)] = vectors.values.to(output)
        return output

    hook = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _weighted(
    states: torch.Tensor, chunks: Sequence[Chunk], emphasis: str, encoder: Any, tokenizer: Any, clip_skip: int
) -> torch.Tensor:
    """The states with the rule applied to each chunk that has weights; the others keep their bits."""
    if not any(chunk.is_weighted for chunk in chunks):
        return states
    empty = states[0]
    if emphasis == "comfyui":
        (empty,), _ = _states(encoder, tokenizer, [Chunk()], clip_skip)
    states = states.clone()
    for row, chunk in enumerate(chunks):
        if chunk.is_weighted:
            weights = torch.tensor(chunk.weights(), dtype=torch.float32, device=states.device)[:, None]
            states[row] = RULES[emphasis](states[row].float(), weights, empty.float())
    if not torch.isfinite(states).all():
        raise InvalidRequest("a weight in the prompt is too large for this model")
    return states
