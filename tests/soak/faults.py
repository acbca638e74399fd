"""Faults inside the worker, by the width of the picture: what no request could bring about on the tiny model."""

from __future__ import annotations

from typing import Any

import torch

# In pixels; no other job of a soak has these.
TWO_FIT, NEVER_FITS, BREAKS, NOT_A_NUMBER = 80, 88, 104, 120


def install(unet: torch.nn.Module) -> None:
    """Let the UNet fail for these widths. Its weights and the bits of other pictures stay."""
    unet.register_forward_pre_hook(_before)
    unet.register_forward_hook(_after)


def _width(inputs: Any) -> int:
    return 8 * int(inputs[0].shape[-1])


def _before(_unet: torch.nn.Module, inputs: Any) -> None:
    # With guidance it sees every picture twice.
    if _width(inputs) == NEVER_FITS or (_width(inputs) == TWO_FIT and len(inputs[0]) > 4):
        raise torch.OutOfMemoryError("CUDA out of memory, says the soak")
    if _width(inputs) == BREAKS:
        raise RuntimeError("the soak breaks this picture")


def _after(_unet: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(output * float("nan") for output in outputs) if _width(inputs) == NOT_A_NUMBER else None
