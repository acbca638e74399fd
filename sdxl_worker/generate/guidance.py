"""Guidance that ends before the run does: later calls of the UNet take one row for each picture instead of two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdxl_worker.generate.modes import Pass
from sdxl_worker.request.sampling import guided_steps

# Up to here diffusers' pipelines leave the negative prompt out.
NO_GUIDANCE = 1.0


def with_guidance_ending(passes: Sequence[Pass], calls: Sequence[int], share: float) -> list[Pass]:
    """`passes`, whose guidance ends after that share of each run's steps; `calls` are their calls of the UNet.

    A pass that goes on where the one before stopped is of the same run; every other one begins its own.
    """
    steps = [-(-made // step.view.scheduler.order) for made, step in zip(calls, passes, strict=True)]
    ended: list[Pass] = []
    left = 0
    for index, (step, own) in enumerate(zip(passes, steps, strict=True)):
        if index == 0 or not step.goes_on:
            end = next((later for later in range(index + 1, len(passes)) if not passes[later].goes_on), len(passes))
            left = guided_steps(sum(steps[index:end]), share)
        ended.append(_ending_after(step, min(left, own), own))
        left -= min(left, own)
    return ended


def call_without_guidance(view: Any, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Let the call of `view` that runs go on without guidance; what its callback at the end of a step has to give back.

    `tensors` are all that the callback can get: of each but the latents the first half is for the negative prompt.
    https://huggingface.co/docs/diffusers/using-diffusers/callback
    """
    view._guidance_scale = NO_GUIDANCE
    doubled = {name: tensor for name, tensor in tensors.items() if name != "latents" and tensor is not None}
    return {name: tensor.chunk(2)[1] for name, tensor in doubled.items()}


def _ending_after(step: Pass, guided: int, steps: int) -> Pass:
    # A UNet that is told the scale (LCM's) has no second row to leave out.
    if guided == steps or step.view.unet.config.time_cond_proj_dim is not None:
        return step
    if guided == 0:
        return dataclasses.replace(step, arguments={**step.arguments, "guidance_scale": NO_GUIDANCE})
    return dataclasses.replace(step, guided_steps=guided)
