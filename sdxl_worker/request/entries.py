"""The lists of references in a request, read alike: one value per usable entry, one warning per entry that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from sdxl_worker.request.fields import REFERENCE_KEYS

T = TypeVar("T")


def parse_entries(
    field: str, entries: Sequence[Any], keys: Sequence[str], read: Callable[[Mapping[str, Any], int], T]
) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """The usable entries of the list `field` in order, and a sentence for each skipped entry or ignored key.

    An entry is a reference string, or a dict with one of REFERENCE_KEYS and any of `keys`. `read(entry, index)` makes
    the value of a dict, as which a string counts as well, and raises ValueError for what makes the entry unusable.
    """
    values: list[T] = []
    warnings: list[str] = []
    for index, entry in enumerate(entries):
        try:
            given = _as_dict(entry, keys)
            values.append(read(given, index))
        except ValueError as problem:
            warnings.append(f"{field}[{index}] was skipped: {problem}")
            continue
        if unknown := unknown_in(given, (*REFERENCE_KEYS, *keys)):
            *others, last = ("path", *keys)
            warnings.append(f"{field}[{index}]: ignored unknown {unknown}; known are {', '.join(others)} and {last}")
    return tuple(values), tuple(warnings)


def _as_dict(entry: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(entry, str):
        return {"path": entry}
    if isinstance(entry, dict):
        return entry
    raise ValueError(f"it is a {kind_of(entry)}, not a string or an object with path and {keys[0]}")


def reference_in(entry: Mapping[str, Any]) -> str:
    """What the first of REFERENCE_KEYS says that is neither null nor empty; else "". Raises ValueError."""
    given = next((key for key in REFERENCE_KEYS if entry.get(key) not in (None, "")), None)
    return "" if given is None else text_in(entry, given)


def text_in(entry: Mapping[str, Any], key: str) -> str:
    """The text under `key`, "" for none. Raises ValueError for what is not a text."""
    text = entry.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"its {key} is a {kind_of(text)}, not a string")
    return text


def unknown_in(given: Iterable[Any], known: Sequence[str]) -> str:
    """The first few unknown names, readable; empty when there are none."""
    return ", ".join(ascii(str(name)[:40]) for name in islice((name for name in given if name not in known), 5))


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
