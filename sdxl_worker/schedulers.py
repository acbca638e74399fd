"""One table: the scheduler names of a request, what diffusers calls them, and what holds for each. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """A value of the request's `scheduler`.

    `class_name` is the class in diffusers and `options` the keyword arguments of its from_config (merged into the
    config they would be dropped where the config lists them in `_use_default_values`); `display_name` is what A1111,
    ComfyUI and Civitai show for the same sampler; `min_steps` is the least num_inference_steps that it runs with.
    """

    name: str
    class_name: str
    display_name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    min_steps: int = 1


_ALL = (
    # PNDM starts with Runge-Kutta steps over its last four timesteps.
    Scheduler("PNDM", "PNDMScheduler", "PLMS", min_steps=4),
    Scheduler("KLMS", "LMSDiscreteScheduler", "LMS"),
    Scheduler("DDIM", "DDIMScheduler", "DDIM"),
    Scheduler("K_EULER", "EulerDiscreteScheduler", "Euler"),
    Scheduler("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler", "Euler a"),
    Scheduler("DPMSolverMultistep", "DPMSolverMultistepScheduler", "DPM++ 2M"),
    Scheduler("DPMSolverSinglestep", "DPMSolverSinglestepScheduler", "DPM++ 2S"),
)

# In the order of the documentation.
SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType({scheduler.name: scheduler for scheduler in _ALL})


def scheduler_names() -> tuple[str, ...]:
    """The names a request may use, in the order of the documentation."""
    return tuple(SCHEDULERS)
