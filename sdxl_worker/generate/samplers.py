"""One table: the scheduler names of a request, and what diffusers calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# The display name is the one A1111, ComfyUI and Civitai show for the same sampler.
SCHEDULERS: dict[str, dict[str, str]] = {
    "PNDM": {"class": "PNDMScheduler", "display": "PLMS"},
    "KLMS": {"class": "LMSDiscreteScheduler", "display": "LMS"},
    "DDIM": {"class": "DDIMScheduler", "display": "DDIM"},
    "K_EULER": {"class": "EulerDiscreteScheduler", "display": "Euler"},
    "K_EULER_ANCESTRAL": {"class": "EulerAncestralDiscreteScheduler", "display": "Euler a"},
    "DPMSolverMultistep": {"class": "DPMSolverMultistepScheduler", "display": "DPM++ 2M"},
    "DPMSolverSinglestep": {"class": "DPMSolverSinglestepScheduler", "display": "DPM++ 2S"},
}


def scheduler_names() -> tuple[str, ...]:
    """The names a request may use, in the order of the documentation."""
    return tuple(SCHEDULERS)


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A fresh scheduler of the given name, from the resident model's scheduler config.

    Fresh for each request: a scheduler carries the step index and, for multistep solvers, past model outputs.
    Raises KeyError for an unknown name.
    """
    import diffusers

    scheduler_class: type[SchedulerMixin] = getattr(diffusers, SCHEDULERS[name]["class"])
    return scheduler_class.from_config(dict(config))
