"""What a LoRA file's metadata says to people: title, trigger words, tags. Never trusted, always bounded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdxl_worker.few_step import recognised
from sdxl_worker.prediction_marks import read_prediction
from sdxl_worker.text import clean_text

_MAX_WORDS = 20
_MAX_TAGS = 10
# What the LoRA is called, the best one first.
_NAMES = ("modelspec.title", "ss_output_name", "name")
# A JSON text inside the metadata may be long (tag counts of a whole data set), but not without end.
_MAX_JSON = 4 * 2**20


def describe(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoraFacts fields that come from metadata (kohya `ss_*`, modelspec, PEFT), all safe to show."""
    said = read_prediction((), metadata)
    names = [_first(metadata, name) for name in _NAMES]
    few_step = recognised(names)
    return {
        "title": next(filter(None, names), ""),
        "few_step": few_step.name if few_step else "",
        "author": _first(metadata, "modelspec.author", "author"),
        "trigger_words": _trigger_words(metadata),
        "top_tags": _top_tags(metadata),
        "resolution": _first(metadata, "modelspec.resolution", "ss_resolution"),
        "prediction": said.kind if said.source else "",
        "trained_on": _first(metadata, "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    }


def _first(metadata: Mapping[str, str], *names: str) -> str:
    for name in names:
        text = clean_text(metadata.get(name))
        if text and text.lower() != "none":
            return text
    return ""


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words the author names; else kohya's data set folders, `10_word class`, which hold the instance words."""
    named = _first(
        metadata, "modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "activation text"
    )
    if named:
        words = [word.strip() for word in named.split(",")]
    else:
        folders = json_object(metadata.get("ss_dataset_dirs", ""))
        words = [match[1] for name in folders if (match := re.fullmatch(r"\d+_(.+)", name))]
    return tuple(dict.fromkeys(clean for word in words if (clean := clean_text(word))))[:_MAX_WORDS]


def _top_tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    counts: Counter[str] = Counter()
    for tags in json_object(metadata.get("ss_tag_frequency", "")).values():
        if isinstance(tags, dict):
            counts.update(
                {tag: number for tag, number in tags.items() if is_number(number) and isinstance(number, int)}
            )
    return tuple((clean_text(tag), number) for tag, number in counts.most_common(_MAX_TAGS) if clean_text(tag))


def json_object(text: object) -> dict[str, Any]:
    """A JSON object in the metadata; empty for anything else, and for what is too long or too deep."""
    if not isinstance(text, str) or len(text) > _MAX_JSON:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> bool:
    """True for a number that is not beyond any sense."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
