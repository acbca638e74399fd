"""What a request's sampler, schedule and steps mean together, and what is wrong with them together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.request.sampler_names import find_schedule, find_scheduler
from sdxl_worker.request.values import SPAN_TOLERANCE
from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS, SCHEDULES
from sdxl_worker.text import shown

# Its authors' figures are of 20 steps and more; the fewer there are, the less one has in common with the next.
_MIN_DEEP_CACHE_STEPS = 10


@dataclass(frozen=True)
class Sampling:
    """The request's values with the tables' own names, what is given in them, and sentences about the way there."""

    values: dict[str, Any]
    given: frozenset[str]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def resolve(values: Mapping[str, Any], given: frozenset[str], bad: Collection[str]) -> Sampling:
    """`scheduler` and `schedule_type` by the names of the tables, and as many num_inference_steps as `timesteps` has.

    `values` are all fields, `given` those that the request gave, `bad` those whose value did not pass its check. What a
    name's end or the length of a list says is given too.
    """
    names = _with_names(values, given, bad)
    steps = _with_steps(names.values, names.given, bad)
    return Sampling(steps.values, steps.given, (*names.problems, *steps.problems), names.warnings)


def _with_steps(values: dict[str, Any], given: frozenset[str], bad: Collection[str]) -> Sampling:
    if values["timesteps"] is None or {"timesteps", "num_inference_steps"} & set(bad):
        return Sampling(values, given)
    steps, asked = len(values["timesteps"]), values["num_inference_steps"]
    problems: tuple[str, ...] = ()
    if "num_inference_steps" in given and asked != steps:
        problems = (f"timesteps has {steps} entries and num_inference_steps is {asked}: leave the latter out",)
    return Sampling({**values, "num_inference_steps": steps}, given | {"num_inference_steps"}, problems)


def _with_names(values: Mapping[str, Any], given: frozenset[str], bad: Collection[str]) -> Sampling:
    if {"scheduler", "schedule_type"} & set(bad):
        return Sampling(dict(values), given)
    named, schedule = find_scheduler(values["scheduler"]), find_schedule(values["schedule_type"])
    assert named is not None, "checked"
    assert schedule is not None, "checked"
    problems, warnings = [], []
    if named.schedule:
        if schedule.name not in (AUTOMATIC, named.schedule.name):
            problems.append(
                f"scheduler {shown(values['scheduler'])} says {named.schedule.name} and schedule_type says "
                f"{schedule.name}: give one of them"
            )
        schedule, given = named.schedule, given | {"schedule_type"}
    if named.is_nearest:
        warnings.append(
            f"scheduler {shown(values['scheduler'])} is not there: drawn with {named.scheduler.name} "
            f"({named.scheduler.display_name}), {named.scheduler.difference}"
        )
    names = {"scheduler": named.scheduler.name, "schedule_type": schedule.name}
    return Sampling({**values, **names}, given, tuple(problems), tuple(warnings))


def sampling_problems(values: Mapping[str, Any], bad: Collection[str] = ()) -> list[str]:
    """What the sampler cannot do of what is asked of it; `values` have the tables' names."""
    if {"scheduler", "schedule_type"} & set(bad):
        return []
    scheduler, schedule = SCHEDULERS[values["scheduler"]], SCHEDULES[values["schedule_type"]]
    problems = []
    if schedule.name not in (AUTOMATIC, *scheduler.schedules):
        takes = ", ".join((AUTOMATIC, *scheduler.schedules))
        problems.append(f"scheduler {scheduler.name} takes schedule_type {takes}, not {schedule.name}")
    has_list = values["timesteps"] is not None and "timesteps" not in bad
    if has_list and not scheduler.timesteps:
        others = ", ".join(name for name, other in SCHEDULERS.items() if other.timesteps)
        problems.append(f"scheduler {scheduler.name} does not take timesteps; these do: {others}")
    elif has_list and schedule.name != AUTOMATIC:
        problems.append(f"timesteps and schedule_type {schedule.name} exclude each other: give one of them")
    steps = values["num_inference_steps"]
    if "num_inference_steps" in bad:
        return problems
    if steps < scheduler.min_steps:
        problems.append(f"scheduler {scheduler.name} needs num_inference_steps of at least {scheduler.min_steps}")
    elif steps < schedule.min_steps:
        problems.append(f"schedule_type {schedule.name} needs num_inference_steps of at least {schedule.min_steps}")
    if scheduler.max_steps and steps > scheduler.max_steps:
        problems.append(f"scheduler {scheduler.name} takes num_inference_steps of at most {scheduler.max_steps}")
    return problems


def sampling_warnings(values: Mapping[str, Any]) -> list[str]:
    """What has no effect of what is asked; `values` have the tables' names."""
    scheduler, warnings = SCHEDULERS[values["scheduler"]], []
    if values["eta"] is not None and scheduler.eta is None:
        others = " and ".join(name for name, other in SCHEDULERS.items() if other.eta is not None)
        warnings.append(f"eta has no effect with scheduler {scheduler.name}; it is for {others}")
    if values["guidance_rescale"] > 0 and values["guidance_scale"] <= 1:
        warnings.append("guidance_rescale has no effect where guidance_scale is at most 1")
    return warnings + _cfg_end_warnings(values) + _deep_cache_warnings(values)


def guided_steps(steps: int, share: float) -> int:
    """How many of a run's `steps` have guidance where `cfg_end` is `share`: those with less than it behind them."""
    return max(0, min(steps, math.ceil((share - SPAN_TOLERANCE) * steps)))


def _cfg_end_warnings(values: Mapping[str, Any]) -> list[str]:
    share, steps = values["cfg_end"], values["num_inference_steps"]
    if share == 1:
        return []
    if values["guidance_scale"] <= 1:
        return ["cfg_end has no effect where guidance_scale is at most 1"]
    scheduler = SCHEDULERS[values["scheduler"]]
    run = -(-scheduler.calls(steps) // scheduler.order)
    # Of a run that leaves out its first steps this holds all the more; other passes have numbers of their own.
    if values["hires"] is None and not values["refiner"] and guided_steps(run, share) == run:
        return [f"cfg_end {share:g} has no effect in {steps} steps: less than that share lies behind the last one"]
    return []


def _deep_cache_warnings(values: Mapping[str, Any]) -> list[str]:
    steps = values["num_inference_steps"]
    # Other passes have numbers of their own.
    if values["deep_cache"] == 1 or values["hires"] is not None or values["refiner"]:
        return []
    if steps <= 2:
        return ["deep_cache has no effect in 2 steps or fewer: the first and the last are calculated whole"]
    if steps < _MIN_DEEP_CACHE_STEPS:
        return [f"deep_cache is for {_MIN_DEEP_CACHE_STEPS} steps or more: in {steps} each changes much of the picture"]
    return []
