"""Render with the scheduler that a request names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sdxl_worker.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline


@contextlib.contextmanager
def applied(pipeline: StableDiffusionXLPipeline, name: str) -> Iterator[None]:
    """Give the pipeline the scheduler `name`, and its own back whatever happens; raises KeyError for another name."""
    resident = pipeline.scheduler
    pipeline.scheduler = make_scheduler(name, resident.config)
    try:
        yield
    finally:
        pipeline.scheduler = resident


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A fresh scheduler of the given name, from the resident model's scheduler config.

    Fresh for each request: a scheduler carries the step index and, for multistep solvers, past model outputs.
    Raises KeyError for an unknown name.
    """
    import diffusers

    scheduler = SCHEDULERS[name]
    scheduler_class: type[SchedulerMixin] = getattr(diffusers, scheduler.class_name)
    return scheduler_class.from_config(dict(config), **scheduler.options)
