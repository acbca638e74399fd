"""The ways in which tokens' weights change what a text encoder made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

# (a chunk's hidden states, weights, hidden states of an empty chunk) -> weighted hidden states.
# Shapes (77, width), (77, 1) and (77, width), in float32.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def original(states: torch.Tensor, weights: torch.Tensor, _empty: torch.Tensor) -> torch.Tensor:
    """z w mean(z) / mean(z w), the means over the chunk: AUTOMATIC1111's "Original"."""
    weighted = states * weights
    return weighted * (states.mean() / weighted.mean())


def no_norm(states: torch.Tensor, weights: torch.Tensor, _empty: torch.Tensor) -> torch.Tensor:
    """z w: AUTOMATIC1111's "No norm", its advice for SDXL."""
    return states * weights


def comfyui(states: torch.Tensor, weights: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """(z - z_empty) w + z_empty: ComfyUI's own."""
    return (states - empty) * weights + empty


RULES: Mapping[str, Rule] = MappingProxyType({"original": original, "no_norm": no_norm, "comfyui": comfyui})
