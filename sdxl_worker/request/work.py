"""How much drawing a request asks for, counted in calls of the UNet and the pixels of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.request.refinement import FIELDS as REFINER_FIELDS
from sdxl_worker.request.refinement import Refinement
from sdxl_worker.request.second_pass import as_hires
from sdxl_worker.schedulers import SCHEDULERS

# The fields that it depends on.
FIELDS = frozenset(
    {"width", "height", "num_images", "num_inference_steps", "scheduler", "strength", "hires", *REFINER_FIELDS}
)
# Two pictures of 1024 x 1024 with 128 calls, or one of 2048 x 2048 with 64: a few minutes on a small GPU.
MAX_PIXEL_CALLS = 2**28


@dataclass(frozen=True)
class PassWork:
    """One run through the steps for each picture: its size in pixels, and the calls of the UNet."""

    width: int
    height: int
    calls: int


def passes(values: Mapping[str, Any], *, to_image: bool, refinement: Refinement | None = None) -> list[PassWork]:
    """What draws one picture of the request whose fields are `values`, by the tables' own names.

    `to_image` = it starts from a picture, which leaves out the first steps; `refinement` is the refiner's part.
    """
    steps, strength = values["num_inference_steps"], values["strength"]
    scheduler, width, height = SCHEDULERS[values["scheduler"]], values["width"], values["height"]
    if refinement is not None:
        runs = [] if refinement.is_alone else [(steps, refinement.base_steps(steps))]
        runs += [(refinement.steps, refinement.drawn_steps)]
        return [PassWork(width, height, scheduler.calls(run, run - part)) for run, part in runs if part]
    skipped = steps - min(int(steps * strength), steps) if to_image else 0
    if skipped == steps:
        return []
    first = PassWork(width, height, scheduler.calls(steps, skipped))
    hires = as_hires(values["hires"])
    if hires is None:
        return [first]
    made = hires.steps or steps
    whole = hires.schedule(made)
    return [first, PassWork(*hires.size(width, height), scheduler.calls(whole, whole - made))]


def problems(values: Mapping[str, Any], *, to_image: bool, refinement: Refinement | None = None) -> list[str]:
    """A sentence when the request asks for too much."""
    each = passes(values, to_image=to_image, refinement=refinement)
    work = values["num_images"] * sum(step.width * step.height * step.calls for step in each)
    if work <= MAX_PIXEL_CALLS:
        return []
    calls = " + ".join(f"{step.width} x {step.height} x {step.calls}" for step in each)
    return [
        f"width x height x calls of the UNet x num_images is ({calls}) x {values['num_images']} = {work} "
        f"and must be at most {MAX_PIXEL_CALLS}"
    ]
