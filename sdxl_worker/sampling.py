"""What a request's sampler, schedule and steps mean together, and what is wrong with them together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.sampler_names import find_schedule, find_scheduler
from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS, SCHEDULES
from sdxl_worker.text import shown


@dataclass(frozen=True)
class Sampling:
    """The request's values with the tables' own names, what is given in them, and sentences about the way there."""

    values: dict[str, Any]
    given: frozenset[str]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def resolve(values: Mapping[str, Any], given: frozenset[str], bad: Collection[str]) -> Sampling:
    """`scheduler` and `schedule_type` by the names of the tables; a schedule at the end of the former counts.

    `values` are all fields, `given` those that the request gave, `bad` those whose value did not pass its check.
    """
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
