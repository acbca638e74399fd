"""What a figure is, and what is wanted of it. Pure data: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# A group's figures share one child process and its pipeline. The first group has no pipeline: what it measures starts
# processes of its own.
PROCESSES, PLAIN, COMPILED = "processes", "plain", "compiled"
# What a dry run's figure takes about.
DRY_SECONDS = 30.0


@dataclass(frozen=True)
class Goal:
    """A number in the result, found by its keys, and the limit that it should keep."""

    what: str
    keys: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None

    def value(self, result: Mapping[str, Any]) -> float | None:
        """The number that was measured; None where there is none."""
        found: Any = result
        for key in self.keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, int | float) else None

    def is_met(self, value: float) -> bool:
        """True when `value` keeps the limit."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    @property
    def limit(self) -> str:
        """The limit in words; empty for a number that is only told."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return f"at least {self.at_least:g}" if self.at_least is not None else ""


@dataclass(frozen=True)
class Figure:
    """What `measure`, "module:function", returns: called as function(pipeline, options) in a process of its group.

    `seconds` is about what it takes on an H100, `full` and `dry` the options for full-size and dry runs.
    """

    name: str
    title: str
    group: str
    measure: str
    seconds: float
    full: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    dry: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    goals: tuple[Goal, ...] = ()
