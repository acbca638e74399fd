"""The request's `hires`: what it may be, and what follows from it. Pure data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.checks import Check, choice, number, or_null, record, whole
from sdxl_worker.schedulers import SCHEDULERS, SCHEDULES

UPSCALERS = ("latent", "lanczos")
# A picture of 1024 x 1024 at scale 3.
MAX_FINAL_PIXELS = 3072 * 3072
# The timesteps that the model was trained with: a schedule has no more, and with some samplers fewer.
MAX_SCHEDULE = 1000
_SIDE_STEP = 8


@dataclass(frozen=True)
class Hires:
    """A second pass over the picture at `scale` times its size, as A1111's hires fix.

    `steps` are those that the second pass makes, None = as many as the first; `strength` is the share of the noise that
    it starts from; `upscaler` is one of UPSCALERS.
    """

    scale: float = 2.0
    steps: int | None = None
    strength: float = 0.4
    upscaler: str = "latent"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the second pass over a picture of this size: rounded down, as A1111 does."""
        # A product that is a multiple may come out a little below it: 800 x 1.15.
        new_width, new_height = (int(side * self.scale / _SIDE_STEP + 1e-6) * _SIDE_STEP for side in (width, height))
        return new_width, new_height

    def schedule(self, steps: int) -> int:
        """The num_inference_steps of which diffusers' image-to-image at `strength` makes the last `steps`.

        A1111 counts so in its second pass: all steps that are asked for are made. Diffusers makes
        int(num_inference_steps * strength).
        """
        whole_schedule = math.ceil(min(steps / self.strength, 1e9))
        # The quotient may be rounded to either side.
        return whole_schedule + (int(whole_schedule * self.strength) < steps)


def hires_check(max_steps: int) -> Check:
    """What `hires` has to be, with steps up to `max_steps`."""
    return record(
        {
            "scale": number(1, 3),
            "steps": or_null(whole(1, max_steps)),
            "strength": number(0, 1, above=True),
            "upscaler": choice(UPSCALERS),
        }
    )


def as_hires(value: Mapping[str, Any] | None) -> Hires | None:
    """A `hires` that passed its check."""
    return None if value is None else Hires(**value)


def hires_problems(values: Mapping[str, Any], bad: Collection[str]) -> list[str]:
    """What is wrong with `hires` beside the request's other fields, of which `bad` are wrong by themselves."""
    hires = None if "hires" in bad else as_hires(values["hires"])
    if hires is None:
        return []
    problems = []
    if not {"width", "height"} & set(bad):
        width, height = hires.size(values["width"], values["height"])
        if width * height > MAX_FINAL_PIXELS:
            problems.append(f"hires.scale makes {width} x {height} pixels and may make at most {MAX_FINAL_PIXELS}")
    if not {"scheduler", "schedule_type"} & set(bad) and ("num_inference_steps" not in bad or hires.steps):
        scheduler, schedule = SCHEDULERS[values["scheduler"]], SCHEDULES[values["schedule_type"]]
        steps = hires.schedule(hires.steps or values["num_inference_steps"])
        most, least = scheduler.max_steps or MAX_SCHEDULE, max(scheduler.min_steps, schedule.min_steps)
        if not least <= steps <= most:
            problems.append(
                f"hires.steps / hires.strength is {steps} and must be from {least} to {most} with {scheduler.name}"
            )
    return problems
