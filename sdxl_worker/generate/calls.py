"""How often a diffusers pipeline will call its UNet, before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unet_calls(view: Any, arguments: Mapping[str, Any]) -> int:
    """The calls of the UNet that `view(**arguments)` makes for a batch, by the timesteps of the view's scheduler.

    The scheduler is set as the call itself will set it anew. See the pipelines' `__call__` and `get_timesteps`.
    """
    scheduler = view.scheduler
    if arguments.get("timesteps") is not None:
        scheduler.set_timesteps(timesteps=arguments["timesteps"])
    else:
        scheduler.set_timesteps(arguments["num_inference_steps"])
    timesteps = scheduler.timesteps
    if hasattr(view, "get_timesteps"):
        steps = arguments["num_inference_steps"] if arguments.get("timesteps") is None else len(timesteps)
        start = arguments.get("denoising_start")
        timesteps, _ = view.get_timesteps(steps, arguments.get("strength"), None, denoising_start=start)
    end = arguments.get("denoising_end")
    if end is None:
        return len(timesteps)
    trained = scheduler.config.num_train_timesteps
    return sum(1 for timestep in timesteps if timestep >= round(trained - end * trained))
