"""What a LoRA file's metadata says to people: title, trigger words, tags. Never trusted, always bounded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdxl_worker.text import clean_text

_MAX_WORDS = 20
_MAX_TAGS = 10
# A JSON text inside the metadata may be long (tag counts of a whole data set), but not without end.
_MAX_JSON = 4 * 2**20


def describe(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoraFacts fields that come from metadata (kohya `ss_*`, modelspec, PEFT), all safe to show."""
    return {
        "title": _first(metadata, "modelspec.title", "ss_output_name", "name"),
        "author": _first(metadata, "modelspec.author", "author"),
        "trigger_words": _trigger_words(metadata),
        "top_tags": _top_tags(metadata),
        "resolution": _first(metadata, "modelspec.resolution", "ss_resolution"),
        "trained_on": _first(metadata, "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    }


def peft_alphas(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's scaling facts that diffusers and PEFT leave in `lora_adapter_metadata`, all other settings left out.

    Keys are `alpha`, `rslora` and `pattern` with a component prefix (`unet.alpha`), or without one where the metadata
    has none. Anything malformed is left out.
    """
    found: dict[str, Any] = {}
    settings = _json_object(metadata.get("lora_adapter_metadata", ""))
    for name, value in settings.items():
        prefix, _, field = name.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if field == "lora_alpha" and _is_number(value):
            found[f"{prefix}alpha"] = float(value)
        elif field == "use_rslora" and value is True:
            found[f"{prefix}rslora"] = True
        elif field == "alpha_pattern" and isinstance(value, dict):
            pattern = {str(key): float(alpha) for key, alpha in value.items() if _is_number(alpha)}
            found[f"{prefix}pattern"] = pattern
    return found


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
        folders = _json_object(metadata.get("ss_dataset_dirs", ""))
        words = [match[1] for name in folders if (match := re.fullmatch(r"\d+_(.+)", name))]
    return tuple(dict.fromkeys(clean for word in words if (clean := clean_text(word))))[:_MAX_WORDS]


def _top_tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    counts: Counter[str] = Counter()
    for tags in _json_object(metadata.get("ss_tag_frequency", "")).values():
        if isinstance(tags, dict):
            counts.update(
                {tag: number for tag, number in tags.items() if _is_number(number) and isinstance(number, int)}
            )
    return tuple((clean_text(tag), number) for tag, number in counts.most_common(_MAX_TAGS) if clean_text(tag))


def _json_object(text: object) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > _MAX_JSON:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
