"""What a value from outside has to be, said once per kind of value: requests and settings share these checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any

from sdxl_worker import data_uris
from sdxl_worker.text import is_clean, shown

MAX_URL_CHARACTERS = 4_096
# More unknown keys of one object are not named.
MAX_UNKNOWN = 5


@dataclass(frozen=True)
class Check:
    """Calling it gives what is wrong with a value, to be read after the value's name, or None.

    `kind` is the type that a good value has (int passes where `kind` is float); `parts` are the checks of an object's
    keys.
    """

    kind: type
    problem: Callable[[Any], str | None]
    parts: Mapping[str, Check] = field(default_factory=lambda: MappingProxyType({}))

    def __call__(self, value: Any) -> str | None:
        return self.problem(value)

    def sentences(self, name: str, value: Any) -> list[str]:
        """What is wrong with the value that has this name; a part of an object is called `name.part`."""
        if self.parts and isinstance(value, dict):
            unknown = islice((key for key in value if key not in self.parts), MAX_UNKNOWN)
            known = ", ".join(self.parts)
            return [
                *(line for key in self.parts if key in value for line in self._of_part(name, key, value[key])),
                *(f"{name} has the unknown key {shown(key)}; known are {known}" for key in unknown),
            ]
        problem = self(value)
        return [f"{name} {problem}"] if problem else []

    def _of_part(self, name: str, key: str, value: Any) -> list[str]:
        return self.parts[key].sentences(f"{name}.{key}", value)


def whole(low: int, high: int, step: int = 1) -> Check:
    """A whole number from `low` to `high`."""
    extra = f" and a multiple of {step}" if step > 1 else ""

    def problem(value: Any) -> str | None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        good = is_whole and low <= value <= high and value % step == 0
        return None if good else f"must be a whole number from {low} to {high}{extra}, not {shown(value)}"

    return Check(int, problem)


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number from `low`, or `above` it, to `high`."""
    bound = "above" if above else "from"

    def problem(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        good = is_number and low <= value <= high and not (above and value == low)
        return None if good else f"must be a number {bound} {low:g} to {high:g}, not {shown(value)}"

    return Check(float, problem)


def text(limit: int) -> Check:
    """A string of at most `limit` characters that can be sent on."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, str):
            return f"must be a string, not {shown(value)}"
        if len(value) > limit:
            return f"must have at most {limit} characters, not {len(value)}"
        return None if is_clean(value) else "holds a NUL or half of a surrogate pair"

    return Check(str, problem)


def url() -> Check:
    """An http or https URL; what it leads to is looked at when it is fetched."""

    def problem(value: Any) -> str | None:
        wrong = text(MAX_URL_CHARACTERS)(value)
        return wrong if wrong or _is_url(value) else "must be an http or https URL"

    return Check(str, problem)


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def picture() -> Check:
    """An http or https URL, a data URI or an empty string; what it leads to is looked at when it is read."""

    def problem(value: Any) -> str | None:
        if isinstance(value, str) and data_uris.is_data_uri(value):
            return data_uris.problem(value)
        wrong = text(MAX_URL_CHARACTERS)(value)
        if wrong or not value or _is_url(value):
            return wrong
        return "must be an http or https URL or a data URI (data:image/png;base64,...)"

    return Check(str, problem)


def _wrong_length(value: list[Any], limit: int) -> str | None:
    return None if 1 <= len(value) <= limit else f"must hold 1 to {limit} entries, not {len(value)}"


def several(check: Check, limit: int) -> Check:
    """A list of 1 to `limit` values that are each good."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"must be a list, not {shown(value)}"
        if wrong_length := _wrong_length(value, limit):
            return wrong_length
        wrong = ((index, check(entry)) for index, entry in enumerate(value))
        return next((f"entry {index} {what}" for index, what in wrong if what), None)

    return Check(list, problem)


def choice(names: tuple[str, ...]) -> Check:
    """One of the given strings."""

    def problem(value: Any) -> str | None:
        good = isinstance(value, str) and value in names
        return None if good else f"must be one of {', '.join(names)}, not {shown(value)}"

    return Check(str, problem)


def spelled(names: tuple[str, ...], known: Callable[[str], object | None]) -> Check:
    """One of the given strings, or anything else that `known` finds something for."""

    def problem(value: Any) -> str | None:
        good = isinstance(value, str) and known(value) is not None
        return None if good else f"must be one of {', '.join(names)}, or another name for one, not {shown(value)}"

    return Check(str, problem)


def falling(low: int, high: int, limit: int) -> Check:
    """A list of 1 to `limit` whole numbers from `high` down to `low`, each below the one before."""
    each = whole(low, high)

    def problem(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"must be a list of whole numbers, not {shown(value)}"
        if wrong_length := _wrong_length(value, limit):
            return wrong_length
        for index, entry in enumerate(value):
            if wrong := each(entry):
                return f"[{index}] {wrong}"
            if index and entry >= value[index - 1]:
                return f"must fall: [{index}] is {entry} after {value[index - 1]}"
        return None

    return Check(list, problem)


def switch() -> Check:
    """True or false."""
    return Check(bool, lambda value: None if isinstance(value, bool) else f"must be true or false, not {shown(value)}")


def record(parts: Mapping[str, Check]) -> Check:
    """An object that may have these keys and no others."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"must be an object with {', '.join(parts)}, not {shown(value)}"
        wrong = Check(dict, lambda _: None, parts).sentences("its", value)
        return wrong[0] if wrong else None

    return Check(dict, problem, parts)


def or_null(check: Check) -> Check:
    """None as well."""
    return Check(check.kind, lambda value: None if value is None else check(value), check.parts)


def as_float(value: int | float) -> float:
    """`value` as a float; infinity for an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
