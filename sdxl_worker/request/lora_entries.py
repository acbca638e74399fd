"""The `loras` list of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sdxl_worker.checks import as_float
from sdxl_worker.request.entries import kind_of, parse_entries, reference_in, text_in, unknown_in
from sdxl_worker.request.fields import REFERENCE_KEYS
from sdxl_worker.request.values import LoraScale, LoraSpan, LoraSpec
from sdxl_worker.text import safe_name, shown

MAX_SCALE = 100.0
_KEYS = ("scale", "name", "start", "end")
SCALE_PARTS = tuple(entry.name for entry in fields(LoraScale))


def parse_lora_entries(entries: Sequence[Any]) -> tuple[tuple[LoraSpec, ...], tuple[str, ...]]:
    """The usable entries in order, and a sentence for each skipped entry or ignored key, naming its index.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS or a `name`, and an optional `scale`: a number,
    or a dict of SCALE_PARTS to numbers, where a missing part takes 1.0. `start` and `end` are those of LoraSpan. A
    `name` alone refers to the cached file of that name. Whether the reference means anything is decided when it is
    resolved.
    """
    return parse_entries("loras", entries, _KEYS, _spec)


def _spec(entry: Mapping[str, Any], index: int) -> LoraSpec:
    return LoraSpec(_reference(entry), _scale(entry), index, _name(entry), span=_span(entry))


def _reference(entry: Mapping[str, Any]) -> str:
    reference = reference_in(entry) or _name(entry)
    if not reference and all(entry.get(key) is None for key in REFERENCE_KEYS):
        raise ValueError("it has no path")
    return reference


def _name(entry: Mapping[str, Any]) -> str:
    name = text_in(entry, "name")
    safe = safe_name(name)
    if name and not safe:
        raise ValueError("its name has no letter or digit that a file name may have")
    return safe


def _scale(entry: Mapping[str, Any]) -> LoraScale:
    value = entry.get("scale", 1.0)
    if not isinstance(value, dict):
        return LoraScale.uniform(_number(value, "its scale"))
    if unknown := unknown_in(value, SCALE_PARTS):
        raise ValueError(f"its scale has the unknown part {unknown}; known are {', '.join(SCALE_PARTS)}")
    return LoraScale(**{part: _number(given, f"its scale for {part}") for part, given in value.items()})


def _span(entry: Mapping[str, Any]) -> LoraSpan:
    given = {key: entry[key] for key in ("start", "end") if entry.get(key) is not None}
    span = LoraSpan(**{key: _number(value, f"its {key}", 0, 1) for key, value in given.items()})
    if span.start >= span.end:
        raise ValueError(f"its start is {span.start:g} and must lie below its end, which is {span.end:g}")
    return span


def _number(value: Any, what: str, low: float = -MAX_SCALE, high: float = MAX_SCALE) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is a {kind_of(value)}, not a number")
    number = as_float(value)
    if not low <= number <= high:
        raise ValueError(f"{what} is {shown(value)} and must lie between {low:g} and {high:g}")
    return number
