"""The `loras` list of a request: one LoraSpec per usable entry, one warning per entry that is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from sdxl_worker.checks import as_float
from sdxl_worker.request import REFERENCE_KEYS, LoraScale, LoraSpec
from sdxl_worker.text import safe_name, shown

MAX_SCALE = 100.0
_KNOWN_KEYS = (*REFERENCE_KEYS, "name", "scale")
SCALE_PARTS = tuple(entry.name for entry in fields(LoraScale))


def parse_lora_entries(entries: Sequence[Any]) -> tuple[tuple[LoraSpec, ...], tuple[str, ...]]:
    """The usable entries in order, and a sentence for each skipped entry or ignored key, naming its index.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS or a `name`, and an optional `scale`: a number,
    or a dict of SCALE_PARTS to numbers, where a missing part takes 1.0. A `name` alone refers to the cached file of
    that name. Whether the reference means anything is decided when it is resolved.
    """
    specs: list[LoraSpec] = []
    warnings: list[str] = []
    for index, entry in enumerate(entries):
        try:
            specs.append(LoraSpec(_reference(entry), _scale(entry), index, _name(entry)))
        except ValueError as problem:
            warnings.append(f"loras[{index}] was skipped: {problem}")
            continue
        if isinstance(entry, dict) and (unknown := unknown_in(entry, _KNOWN_KEYS)):
            warnings.append(f"loras[{index}]: ignored unknown {unknown}; known are path, name and scale")
    return tuple(specs), tuple(warnings)


def _reference(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"it is a {kind_of(entry)}, not a string or an object with path and scale")
    given = [key for key in REFERENCE_KEYS if entry.get(key) not in (None, "")]
    if given and not isinstance(entry[given[0]], str):
        raise ValueError(f"its {given[0]} is a {kind_of(entry[given[0]])}, not a string")
    if given:
        return entry[given[0]]
    name = _name(entry)
    if not name and all(entry.get(key) is None for key in REFERENCE_KEYS):
        raise ValueError("it has no path")
    return name


def _name(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    if name in (None, ""):
        return ""
    if not isinstance(name, str):
        raise ValueError(f"its name is a {kind_of(name)}, not a string")
    safe = safe_name(name)
    if not safe:
        raise ValueError("its name has no letter or digit that a file name may have")
    return safe


def _scale(entry: Any) -> LoraScale:
    value = entry.get("scale", 1.0) if isinstance(entry, dict) else 1.0
    if not isinstance(value, dict):
        return LoraScale.uniform(_number(value, "its scale"))
    if unknown := unknown_in(value, SCALE_PARTS):
        raise ValueError(f"its scale has the unknown part {unknown}; known are {', '.join(SCALE_PARTS)}")
    return LoraScale(**{part: _number(given, f"its scale for {part}") for part, given in value.items()})


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is a {kind_of(value)}, not a number")
    number = as_float(value)
    if math.isnan(number) or abs(number) > MAX_SCALE:
        raise ValueError(f"{what} is {shown(value)} and must lie between {-MAX_SCALE:g} and {MAX_SCALE:g}")
    return number


def unknown_in(given: Iterable[Any], known: Sequence[str]) -> str:
    """The first few unknown names, readable; empty when there are none."""
    return ", ".join(ascii(str(name)[:40]) for name in islice((name for name in given if name not in known), 5))


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
