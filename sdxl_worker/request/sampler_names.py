"""Samplers and schedules by the names that people use: A1111's and Forge's, ComfyUI's, and diffusers' classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sdxl_worker.schedulers import SCHEDULERS, SCHEDULES, Schedule, Scheduler

# What is longer is nobody's name, and need not be looked at.
MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    `schedule` is None where the name says nothing about it. `is_nearest`: diffusers does not have the sampler of that
    name, and this is the one nearest to it.
    """

    scheduler: Scheduler
    schedule: Schedule | None = None
    is_nearest: bool = False


def find_schedule(name: str) -> Schedule | None:
    """The schedule of that name, however it is written."""
    return _SCHEDULES.get(_key(name)) if len(name) <= MAX_NAME_CHARACTERS else None


def find_scheduler(name: str) -> Named | None:
    """The sampler of that name, however it is written, with or without a schedule at its end."""
    if len(name) > MAX_NAME_CHARACTERS:
        return None
    key = _key(name)
    if whole := _find(key):
        return whole
    for end, schedule in _SCHEDULES.items():
        if key.endswith(end) and (start := _find(key.removesuffix(end))):
            return Named(start.scheduler, schedule, start.is_nearest)
    return None


def _find(key: str) -> Named | None:
    # A1111 and diffusers put a k before the samplers of k-diffusion.
    return _SCHEDULERS.get(key) or _SCHEDULERS.get(key.removeprefix("k"))


def _key(name: str) -> str:
    """The name without what people write differently: capitals, and all but letters and digits."""
    return "".join(letter for letter in name.lower().replace("++", "pp") if letter.isalnum())


def _scheduler_keys() -> Iterator[tuple[str, Named]]:
    # A class's name stands for the first sampler that is drawn with it: what comes later in a dict counts.
    for scheduler in reversed(tuple(SCHEDULERS.values())):
        for name in (scheduler.class_name, scheduler.class_name.removesuffix("Scheduler")):
            yield _key(name), Named(scheduler)
    for scheduler in SCHEDULERS.values():
        for name in scheduler.nearest_to:
            yield _key(name), Named(scheduler, is_nearest=True)
        for name in (scheduler.name, scheduler.display_name, *scheduler.other_names):
            yield _key(name), Named(scheduler)


def _schedule_keys() -> Iterator[tuple[str, Schedule]]:
    for schedule in SCHEDULES.values():
        for name in (schedule.name, schedule.display_name, *schedule.other_names):
            yield _key(name), schedule


_SCHEDULERS: Mapping[str, Named] = MappingProxyType(dict(_scheduler_keys()))
_SCHEDULES: Mapping[str, Schedule] = MappingProxyType(dict(_schedule_keys()))
