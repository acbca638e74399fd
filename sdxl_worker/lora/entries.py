"""Read the `loras` list of a request: one LoraSpec per usable entry, one warning per entry that is skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sdxl_worker.request import LoraScale, LoraSpec

# What users of other workers call the reference; the first one that is given counts.
REFERENCE_KEYS = ("path", "url", "source")
SCALE_PARTS = tuple(entry.name for entry in fields(LoraScale))


def parse_lora_entries(entries: Sequence[Any]) -> tuple[tuple[LoraSpec, ...], tuple[str, ...]]:
    """The usable entries in order, and a sentence for each skipped entry or ignored key, naming its index.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS and an optional `scale`: a finite number, or
    a dict of SCALE_PARTS to finite numbers, where a missing part takes 1.0. Whether the reference means anything is
    decided when it is resolved.
    """
    specs: list[LoraSpec] = []
    warnings: list[str] = []
    for index, entry in enumerate(entries):
        try:
            specs.append(LoraSpec(_reference(entry), _scale(entry), index))
        except ValueError as problem:
            warnings.append(f"loras[{index}] was skipped: {problem}")
            continue
        if isinstance(entry, dict) and (unknown := set(entry) - {*REFERENCE_KEYS, "scale"}):
            names = ", ".join(sorted(ascii(str(name)[:40]) for name in unknown)[:5])
            warnings.append(f"loras[{index}]: ignored unknown {names}; known are path and scale")
    return tuple(specs), tuple(warnings)


def _reference(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"it is a {_kind(entry)}, not a string or an object with path and scale")
    key = next((key for key in REFERENCE_KEYS if key in entry), None)
    if key is None:
        raise ValueError("it has no path")
    if not isinstance(entry[key], str):
        raise ValueError(f"its {key} is a {_kind(entry[key])}, not a string")
    return entry[key]


def _scale(entry: Any) -> LoraScale:
    value = entry.get("scale", 1.0) if isinstance(entry, dict) else 1.0
    if not isinstance(value, dict):
        return LoraScale.uniform(finite(value, "its scale"))
    if unknown := set(value) - set(SCALE_PARTS):
        names = ", ".join(sorted(ascii(str(name)[:40]) for name in unknown)[:5])
        raise ValueError(f"its scale has the unknown part {names}; known are {', '.join(SCALE_PARTS)}")
    return LoraScale(**{part: finite(number, f"its scale for {part}") for part, number in value.items()})


def finite(value: Any, what: str) -> float:
    """`value` as a float; raises ValueError, saying `what` is wrong, for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is a {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is not a finite number")
    return number


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
