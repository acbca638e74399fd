"""Render with the sampler and the schedule that a request names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS, SCHEDULES

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline

    from sdxl_worker.request import GenerationRequest

# What a checkpoint's config may ask for, and another schedule has to leave out.
_OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@contextlib.contextmanager
def applied(pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> Iterator[None]:
    """Give the pipeline the request's sampler, and its own back whatever happens.

    Raises KeyError for a name that is not in the tables.
    """
    resident = pipeline.scheduler
    pipeline.scheduler = make_scheduler(request.scheduler, resident.config, request.schedule_type)
    try:
        yield
    finally:
        pipeline.scheduler = resident


def make_scheduler(name: str, config: Mapping[str, Any], schedule_type: str = AUTOMATIC) -> SchedulerMixin:
    """A fresh scheduler of the given names, from the resident model's scheduler config.

    Fresh for each request: a scheduler carries the step index and, for multistep solvers, past model outputs.
    Raises KeyError for an unknown name.
    """
    import diffusers

    scheduler = SCHEDULERS[name]
    scheduler_class: type[SchedulerMixin] = getattr(diffusers, scheduler.class_name)
    options = {**_schedule_options(schedule_type), **scheduler.options}
    taken = inspect.signature(scheduler_class).parameters
    made = scheduler_class.from_config(
        dict(config), **{option: value for option, value in options.items() if option in taken}
    )
    if any(made.config.get(option) for option in _OWN_LEVELS):
        _start_at_the_first_step(made)
    return made


def seed(scheduler: SchedulerMixin, seeds: Sequence[int]) -> None:
    """Let the scheduler draw from these seeds, one for each picture, what it does not draw from generators."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = list(seeds)


def _start_at_the_first_step(scheduler: SchedulerMixin) -> None:
    """Begin with the first timestep where it stands twice in the list.

    Beta rounds two to 999 from 32 steps on; so do Karras and Exponential from zero terminal SNR, from 21 steps on.
    Stock schedulers look it up and begin with the second, so that the last step finds no noise level.
    """
    stock = type(scheduler).set_timesteps
    # A reference from the scheduler to itself would keep its tensors until the next garbage collection.
    itself = weakref.ref(scheduler)

    @functools.wraps(stock)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        if (there := itself()) is not None:
            stock(there, *args, **kwargs)
            there.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps


def _schedule_options(schedule_type: str) -> dict[str, Any]:
    if schedule_type == AUTOMATIC:
        return {}
    return {**dict.fromkeys(_OWN_LEVELS, False), **SCHEDULES[schedule_type].options}
