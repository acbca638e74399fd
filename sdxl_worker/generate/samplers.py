"""Render with the sampler and the schedule that a request names."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_worker.generate.host_schedule import on_host
from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS, SCHEDULES

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline

    from sdxl_worker.request import GenerationRequest

# What a checkpoint's config may ask for, and another schedule has to leave out.
_OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# What a checkpoint's config says of the solver that its author draws with, and of no other: by these names another
# class means something else, or raises (dreamshaper-xl has DEIS, which DPMSolverMultistep takes for its own algorithm).
_OF_ONE_SOLVER = frozenset({"algorithm_type", "solver_order", "solver_type", "lower_order_final", "variance_type"})


@contextlib.contextmanager
def applied(pipeline: StableDiffusionXLPipeline, request: GenerationRequest) -> Iterator[None]:
    """Give the pipeline the request's sampler, whose steps do not wait for the device, and its own back in any case.

    Raises KeyError for a name that is not in the tables.
    """
    resident = pipeline.scheduler
    pipeline.scheduler = make_scheduler(
        request.scheduler, resident.config, request.schedule_type, own_levels=request.timesteps is None
    )
    try:
        with on_host(pipeline):
            yield
    finally:
        pipeline.scheduler = resident


def call_arguments(request: GenerationRequest) -> dict[str, Any]:
    """What a call of a diffusers pipeline is told for the request's sampler."""
    arguments: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.timesteps is not None:
        arguments["timesteps"] = list(request.timesteps)
    default = SCHEDULERS[request.scheduler].eta
    if default is not None:
        # Left out, the pipeline's own 0 would override the sampler's default.
        arguments["eta"] = default if request.eta is None else request.eta
    return arguments


def make_scheduler(
    name: str, config: Mapping[str, Any], schedule_type: str = AUTOMATIC, *, own_levels: bool = True
) -> SchedulerMixin:
    """A fresh scheduler of the given names, from the resident model's scheduler config.

    Of the config counts what it says of the model and its noise levels: a name means one solver on every checkpoint.
    `own_levels`: automatic means Karras where the config asks for it, and the like; a list of timesteps is for none.
    Fresh for each request: a scheduler carries the step index and, for multistep solvers, past model outputs.
    Raises KeyError for an unknown name.
    """
    import diffusers

    scheduler = SCHEDULERS[name]
    scheduler_class: type[SchedulerMixin] = getattr(diffusers, scheduler.class_name)
    options = {**_schedule_options(schedule_type, own_levels), **scheduler.options}
    taken = inspect.signature(scheduler_class).parameters
    return scheduler_class.from_config(
        {option: value for option, value in config.items() if option not in _OF_ONE_SOLVER},
        **{option: value for option, value in options.items() if option in taken},
    )


def seed(scheduler: SchedulerMixin, seeds: Sequence[int]) -> None:
    """Let the scheduler draw from these seeds, one for each picture, what it does not draw from generators."""
    if hasattr(scheduler, "noise_sampler_seed"):
        # torchsde says so whenever a noise level lies beyond its range by a rounding. For the whole process:
        # catch_warnings is not safe in threads.
        warnings.filterwarnings("ignore", message="Should have", module=r"torchsde\.")
        scheduler.noise_sampler_seed = list(seeds)


def _schedule_options(schedule_type: str, own_levels: bool) -> dict[str, Any]:
    if schedule_type == AUTOMATIC and own_levels:
        return {}
    return {**dict.fromkeys(_OWN_LEVELS, False), **SCHEDULES[schedule_type].options}
