"""SDXL's text encoding and denoising written out from their formulas, to hold the worker's pictures against.

Nothing here repeats, pads or batches what the formulas do not ask for: prompt and negative prompt go through the UNet
one after another, each in its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# A chunk's text in order, with the weight of each part; None stands for a negative prompt that was left out.
Part = tuple[str, float]
Chunks = Sequence[Sequence[Part]]
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def mean_kept(z: torch.Tensor, w: torch.Tensor, _empty: torch.Tensor) -> torch.Tensor:
    """A1111's "Original"."""
    return z * w * (z.mean() / (z * w).mean())


def times(z: torch.Tensor, w: torch.Tensor, _empty: torch.Tensor) -> torch.Tensor:
    """A1111's "No norm"."""
    return z * w


def from_empty(z: torch.Tensor, w: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """ComfyUI's."""
    return (z - empty) * w + empty


@dataclass(frozen=True)
class Text:
    """A prompt's states (1, places, width) and pooled state."""

    states: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def encoded(pipeline: Any, chunks: Chunks, rule: Rule = mean_kept, layer: int = 2) -> Text:
    """The chunks, each encoded alone and weighted; layer 2 is the one before the last."""
    per_encoder = []
    pooled = torch.empty(0)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        if encoder is None:  # a refiner
            continue
        states = []
        for index, chunk in enumerate(chunks):
            z, first = _through(tokenizer, encoder, chunk, layer)
            empty, _ = _through(tokenizer, encoder, [], layer)
            weights = [w for text, w in chunk for _ in tokenizer(text, add_special_tokens=False).input_ids]
            w = torch.tensor([1.0, *weights, *[1.0] * (76 - len(weights))])[:, None]
            states.append(rule(z, w, empty))
            pooled = pooled if index else first
        per_encoder.append(torch.cat(states))
    return Text(torch.cat(per_encoder, -1)[None], pooled)


def _through(tokenizer: Any, encoder: Any, chunk: Sequence[Part], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = [token for words, _ in chunk for token in tokenizer(words, add_special_tokens=False).input_ids]
    assert len(text) <= 75, "the test's own chunk is too long"
    padding = {"<|endoftext|>": 513, "!": 0}[tokenizer.pad_token]
    ids = [512, *text, 513]
    output = encoder(torch.tensor([ids + [padding] * (77 - len(ids))]), output_hidden_states=True)
    return output.hidden_states[-layer][0], output[0]


@torch.no_grad()
def picture(
    pipeline: Any, prompt: Text, negative: Text | None, *, seed: int, steps: int, guidance: float, side: int
) -> np.ndarray:
    """An RGB picture (side, side, 3) as uint8, drawn with the pipeline's own scheduler class at SDXL's settings."""
    negative = negative or Text(torch.zeros_like(prompt.states), torch.zeros_like(prompt.pooled))
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = torch.randn((1, 4, side // 8, side // 8), generator=torch.Generator().manual_seed(seed))
    latents = noise * scheduler.init_noise_sigma
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, step)
        with_prompt, without = (
            pipeline.unet(
                scaled,
                step,
                encoder_hidden_states=text.states,
                added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
            ).sample
            for text in (prompt, negative)
        )
        noise = without + guidance * (with_prompt - without)
        latents = scheduler.step(noise, step, latents).prev_sample
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
