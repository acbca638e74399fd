"""What a request asks of the refiner. Pure data: the limits, the pictures' text and the rendering follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.request import picture_rules
from sdxl_worker.request.fields import MAX_STEPS, GenerationRequest
from sdxl_worker.request.sampling import sampling_problems
from sdxl_worker.request.values import default_strength

FIELDS = ("refiner_inference_steps", "high_noise_frac")


@dataclass(frozen=True)
class Refinement:
    """The refiner's part in a picture; `steps` is its num_inference_steps.

    `switch_at` is the share of the noise schedule after which the base model stops; None: it goes to the end.
    `strength` is how much of what the refiner gets it noises and draws anew; None: it goes on where the base model
    stopped. `is_alone` says that no base model comes before: the refiner redraws the request's picture.
    """

    steps: int
    switch_at: float | None = None
    strength: float | None = None
    is_alone: bool = False

    @property
    def drawn_steps(self) -> int:
        """How many of the steps the refiner makes, rounded up where the sampler's timesteps decide."""
        if self.strength is not None:
            return int(self.steps * self.strength)
        return math.ceil(self.steps * (1 - (self.switch_at or 0)))

    def base_steps(self, steps: int) -> int:
        """How many of its `steps` the base model makes, rounded up likewise."""
        return steps if self.switch_at is None else math.ceil(steps * self.switch_at)


def refinement_of(request: GenerationRequest) -> Refinement | None:
    """What the worker's refiner does for `request`; None when there is no refiner, or nothing is asked of it."""
    return plan(vars(request))


def plan(values: Mapping[str, Any]) -> Refinement | None:
    """The same for a request's `values`, those of its fields, `given` and `refiner`; no refiner for masks and `hires`.

    RunPod's worker-sdxl calls base(denoising_end=high_noise_frac) and then
    refiner(num_inference_steps=refiner_inference_steps, strength=strength) on its latents; with a picture to start
    from, the refiner alone. Of high_noise_frac alone nothing is noised twice: the refiner gets
    denoising_start=high_noise_frac and the base model's number of steps, as diffusers' documentation has it.
    """
    steps, share, strength = (values[name] for name in (*FIELDS, "strength"))
    if strength is None:
        strength = default_strength(masked=False, extended=False)
    to_image = picture_rules.starts_from_picture(values)
    # diffusers, too, reads 0 and 1 as if nothing was said.
    switch_at = float(share) if share is not None and 0 < share < 1 and not to_image else None
    if not values["refiner"] or picture_rules.is_inpainting(values) or values["hires"] or steps == 0:
        return None
    goes_on = switch_at is not None and steps is None and "strength" not in values["given"]
    if (steps is None and switch_at is None) or (not goes_on and strength == 0):
        return None
    return Refinement(steps or values["num_inference_steps"], switch_at, None if goes_on else strength, to_image)


def refiner_problems(values: Mapping[str, Any], refinement: Refinement | None) -> list[str]:
    """What is wrong with what is asked of the refiner beside the limits on work."""
    if refinement is None:
        return []
    steps, name = refinement.steps, "refiner_inference_steps"
    if values[name] is None:
        name = "num_inference_steps"
    problems = []
    if steps > MAX_STEPS:
        problems.append(f"{name} must be at most {MAX_STEPS}, not {steps}")
    problems += [
        problem.replace("num_inference_steps", name)
        for problem in sampling_problems({**values, "num_inference_steps": steps, "timesteps": None})
        if name in FIELDS and "num_inference_steps" in problem
    ]
    if refinement.strength is not None and refinement.drawn_steps < 1:
        problems.append(f"{name} x strength must be at least 1 with the refiner")
    return problems


def unused(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each of the refiner's fields that is given in vain; `values` as for `plan`."""
    given = [name for name in FIELDS if values[name] is not None]
    steps, share = (values[name] for name in FIELDS)
    reason = ""
    if not values["refiner"]:
        reason = "has no effect: this worker has no refiner"
    elif picture_rules.is_inpainting(values):
        reason = "has no effect with a mask or extend"
    elif values["hires"]:
        reason = "has no effect with hires"
    elif values["strength"] == 0 and steps != 0 and plan(values) is None:
        reason = "has no effect with strength 0"
    if reason:
        yield from (f"{name} {reason}" for name in given)
    elif share is not None and picture_rules.starts_from_picture(values):
        yield "high_noise_frac has no effect with a picture to start from"
    elif share is not None and steps == 0:
        yield "high_noise_frac has no effect: refiner_inference_steps is 0"
    elif share in (0, 1):
        yield "high_noise_frac has no effect at 0 and 1: between them the refiner takes over"
