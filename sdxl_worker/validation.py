"""The job's input: its schema in the RunPod SDK's format, and the whole validation of one request."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runpod.serverless.utils.rp_validator import validate

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.lora.entries import REFERENCE_KEYS, finite, parse_lora_entries
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import SCHEDULERS, scheduler_names
from sdxl_worker.text import is_clean, is_unicode, shown

MAX_PROMPT_CHARACTERS = 10_000
MAX_URL_CHARACTERS = 4_096
MIN_SIDE, MAX_SIDE, SIDE_STEP = 64, 2048, 8
MAX_STEPS = 200
MAX_GUIDANCE = 100.0
MAX_IMAGES = 2
MAX_SEED = 2**64 - 1
MAX_LORAS = 32
# Two pictures of 1024 x 1024 with 128 steps, or one of 2048 x 2048 with 64: a few minutes on a small GPU.
MAX_PIXEL_STEPS = 2**28
# More would only be the same mistake again, such as a file pasted in as fields.
MAX_PROBLEMS = 40
OUTPUT_FORMATS = ("png", "jpeg", "webp", "auto")
# A random seed that every JSON reader takes without rounding.
RANDOM_SEED_BITS = 32

# A check returns what is wrong with a value, to be read after the field's name, or None.
Check = Callable[[Any], str | None]


@dataclass(frozen=True)
class Field:
    """One input field: `required` fields have no default."""

    kind: type
    check: Check
    default: Any = None
    required: bool = False

    def as_schema(self) -> dict[str, Any]:
        """The field in rp_validator's format."""
        schema = {"type": self.kind, "required": self.required, "constraints": lambda value: self.check(value) is None}
        return schema if self.required else {**schema, "default": self.default}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(low: int, high: int, step: int = 1) -> Check:
    extra = f" and a multiple of {step}" if step > 1 else ""

    def check(value: Any) -> str | None:
        good = _is_whole(value) and low <= value <= high and value % step == 0
        return None if good else f"must be a whole number from {low} to {high}{extra}, not {shown(value)}"

    return check


def _number(low: float, high: float, *, above: bool = False) -> Check:
    bound = "above" if above else "from"

    def check(value: Any) -> str | None:
        try:
            number = finite(value, "")
        except ValueError:
            number = None
        good = number is not None and low <= number <= high and not (above and number == low)
        return None if good else f"must be a number {bound} {low:g} to {high:g}, not {shown(value)}"

    return check


def _text(limit: int) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return f"must be a string, not {shown(value)}"
        if len(value) > limit:
            return f"must have at most {limit} characters, not {len(value)}"
        return None if is_clean(value) else "holds a NUL or half of a surrogate pair"

    return check


def _url(value: Any) -> str | None:
    problem = _text(MAX_URL_CHARACTERS)(value)
    if problem is None and not value.lower().startswith(("http://", "https://")):
        return "must be an http or https URL"
    return problem


def _choice(names: tuple[str, ...]) -> Check:
    def check(value: Any) -> str | None:
        good = isinstance(value, str) and value in names
        return None if good else f"must be one of {', '.join(names)}, not {shown(value)}"

    return check


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"


def _loras(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be a list, not {shown(value)}"
    if len(value) > MAX_LORAS:
        return f"may hold at most {MAX_LORAS} entries, not {len(value)}"
    unclean = [str(index) for index, entry in enumerate(value) if not all(map(is_unicode, _strings_of(entry)))]
    return f"hold half of a surrogate pair in entry {', '.join(unclean)}" if unclean else None


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


FIELDS: dict[str, Field] = {
    "prompt": Field(str, _text(MAX_PROMPT_CHARACTERS), required=True),
    "negative_prompt": Field(str, _or_null(_text(MAX_PROMPT_CHARACTERS))),
    "height": Field(int, _whole(MIN_SIDE, MAX_SIDE, SIDE_STEP), 1024),
    "width": Field(int, _whole(MIN_SIDE, MAX_SIDE, SIDE_STEP), 1024),
    "seed": Field(int, _or_null(_whole(0, MAX_SEED))),
    "scheduler": Field(str, _choice(scheduler_names()), "K_EULER_ANCESTRAL"),
    "num_inference_steps": Field(int, _whole(1, MAX_STEPS), 28),
    "guidance_scale": Field(float, _number(0, MAX_GUIDANCE), 5.5),
    "num_images": Field(int, _whole(1, MAX_IMAGES), 1),
    "image_url": Field(str, _or_null(_url)),
    "strength": Field(float, _number(0, 1, above=True), 0.3),
    "refiner_inference_steps": Field(int, _or_null(_whole(0, 1000))),
    "high_noise_frac": Field(float, _or_null(_number(0, 1))),
    "loras": Field(list, _loras, []),
    "output_format": Field(str, _choice(OUTPUT_FORMATS), "png"),
    "output_quality": Field(int, _whole(1, 100), 90),
    "preview": Field(bool, _switch, False),
}

INPUT_SCHEMA: dict[str, dict[str, Any]] = {name: field.as_schema() for name, field in FIELDS.items()}


def validate_request(raw: Any) -> GenerationRequest:
    """The request in `raw` with every default filled in; a missing seed is drawn at random.

    Malformed `loras` entries are skipped and named in `warnings`. Raises InvalidRequest, naming every problem.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest(f"input must be an object with at least a prompt, not {shown(raw)}")
    problems = _field_problems(raw)
    values = {**_defaults(), **raw}
    sentences = [*problems.values(), *_combined_problems(values, problems)]
    if sentences:
        raise InvalidRequest("; ".join(sentences[:MAX_PROBLEMS]))
    specs, lora_warnings = parse_lora_entries(values["loras"])
    return GenerationRequest(
        **{name: values[name] for name in _COPIED},
        seed=secrets.randbits(RANDOM_SEED_BITS) if values["seed"] is None else values["seed"],
        guidance_scale=float(values["guidance_scale"]),
        strength=float(values["strength"]),
        loras=specs,
        loras_requested=bool(values["loras"]),
        warnings=lora_warnings + _ignored(raw),
    )


_COPIED = (
    *("prompt", "negative_prompt", "height", "width", "scheduler", "num_inference_steps", "num_images", "image_url"),
    *("output_format", "output_quality", "preview"),
)


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in FIELDS.items() if not field.required}


def _field_problems(raw: dict[str, Any]) -> dict[str, str]:
    """A sentence per bad field: our own, or rp_validator's where we found nothing.

    rp_validator skips a constraint when the value has the default's type, lets `true` pass as a number, and raises
    on an integer that no float can hold.
    """
    ours = {name: f"{name} {problem}" for name, field in FIELDS.items() if (problem := _problem(name, field, raw))}
    ours |= {name: f"{shown(name)} is not an input field" for name in raw if name not in FIELDS}
    if ours:
        return ours
    given = {name: value for name, value in raw.items() if value is not None}
    return {str(error): str(error) for error in validate(given, INPUT_SCHEMA).get("errors", ())}


def _problem(name: str, field: Field, raw: Mapping[str, Any]) -> str | None:
    if name in raw:
        return field.check(raw[name])
    return "is required" if field.required else None


def _combined_problems(values: Mapping[str, Any], bad: Collection[str]) -> list[str]:
    """What is wrong with fields that are each good on their own."""
    problems = []
    factors = ("width", "height", "num_images", "num_inference_steps")
    work = 0 if set(factors) & set(bad) else math.prod(values[name] for name in factors)
    if work > MAX_PIXEL_STEPS:
        problems.append(f"{' x '.join(factors)} is {work} and must be at most {MAX_PIXEL_STEPS}")
    scheduler, steps = values["scheduler"], values["num_inference_steps"]
    least = 1 if {"scheduler", "num_inference_steps"} & set(bad) else SCHEDULERS[scheduler].min_steps
    if "num_inference_steps" not in bad and steps < least:
        problems.append(f"scheduler {scheduler} needs num_inference_steps of at least {least}")
    image_fields = {"image_url", "num_inference_steps", "strength"}
    to_image = not image_fields & set(bad) and values["image_url"] is not None
    if to_image and int(steps * values["strength"]) < 1:
        problems.append("num_inference_steps x strength must be at least 1 with image_url")
    return problems


def _ignored(raw: Mapping[str, Any]) -> tuple[str, ...]:
    warnings = [
        f"{name} has no effect: this worker has no refiner"
        for name in ("refiner_inference_steps", "high_noise_frac")
        if raw.get(name) is not None
    ]
    if "strength" in raw and raw.get("image_url") is None:
        warnings.append("strength has no effect without image_url")
    return tuple(warnings)


def _strings_of(entry: Any) -> list[str]:
    candidates = [entry, *(entry.get(key) for key in REFERENCE_KEYS)] if isinstance(entry, dict) else [entry]
    return [candidate for candidate in candidates if isinstance(candidate, str)]
