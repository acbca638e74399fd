"""The request: its fields with their types, ranges and defaults, as frozen values that travel through the worker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from sdxl_worker.checks import (
    MAX_URL_CHARACTERS,
    Check,
    choice,
    falling,
    number,
    or_null,
    picture,
    record,
    several,
    spelled,
    switch,
    text,
    whole,
)
from sdxl_worker.request.sampler_names import find_schedule, find_scheduler
from sdxl_worker.request.second_pass import Hires, as_hires, hires_check
from sdxl_worker.request.values import EmbeddingSpec, Extend, LoraSpec, default_strength
from sdxl_worker.schedulers import AUTOMATIC, schedule_names, scheduler_names
from sdxl_worker.settings import PROMPT_SYNTAXES
from sdxl_worker.text import is_unicode, shown

MAX_PROMPT_CHARACTERS = 10_000
MIN_SIDE, MAX_SIDE, SIDE_STEP = 64, 2048, 8
MAX_STEPS = 200
# SDXL is trained on the timesteps from 0 (nearly clean) to 999 (nearly noise).
MAX_TIMESTEP = 999
# AUTOMATIC1111's sliders end there.
MAX_MASK_BLUR, MAX_INPAINT_PADDING = 64, 256
MAX_GUIDANCE = 100.0
# The figures of DeepCache's authors end there.
MAX_DEEP_CACHE = 10
MAX_IMAGES = 8
MAX_SEED = 2**64 - 1
MAX_LORAS = 32
MAX_EMBEDDINGS = 64
EMPHASIS_RULES = ("original", "no_norm", "comfyui")
# As Civitai counts: SDXL itself reads the layer before the last, and CLIP-L has twelve.
DEFAULT_CLIP_SKIP, MAX_CLIP_SKIP = 2, 12
OUTPUT_FORMATS = ("png", "jpeg", "webp", "auto")
# A random seed that every JSON reader takes without rounding.
RANDOM_SEED_BITS = 32
# What users of other workers call a LoRA's reference; the first one that is given counts.
REFERENCE_KEYS = ("path", "url", "source")


def reference_list(limit: int) -> Check:
    """A list of bounded length and texts. Anything else that is wrong with an entry costs just that entry."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"must be a list, not {shown(value)}"
        if len(value) > limit:
            return f"may hold at most {limit} entries, not {len(value)}"
        texts = [(index, string) for index, entry in enumerate(value) for string in _texts_of(entry)]
        if long := {str(index): None for index, string in texts if len(string) > MAX_URL_CHARACTERS}:
            return f"hold a reference of more than {MAX_URL_CHARACTERS} characters in entry {', '.join(long)}"
        unclean = {str(index): None for index, string in texts if not is_unicode(string)}
        return f"hold half of a surrogate pair in entry {', '.join(unclean)}" if unclean else None

    return Check(list, problem)


def _texts_of(entry: Any) -> list[str]:
    texts = (
        [entry, *(entry.get(key) for key in (*REFERENCE_KEYS, "name", "token"))] if isinstance(entry, dict) else [entry]
    )
    return [text for text in texts if isinstance(text, str)]


@dataclass(frozen=True)
class InputField:
    """One field of the input. `read` turns a value that passed the check into the one that GenerationRequest holds."""

    check: Check
    default: Any
    read: Callable[[Any], Any]
    required: bool

    def as_schema(self) -> dict[str, Any]:
        """The field in the format of the SDK's rp_validator."""
        good = {"constraints": lambda value: self.check(value) is None}
        rules = {"type": self.check.kind, "required": self.required, **good}
        return rules if self.required else {**rules, "default": self.default}


def _input(check: Check, default: Any = MISSING, read: Callable[[Any], Any] | None = None) -> Any:
    """A dataclass field that the request's field of the same name fills; required when it has no default."""
    required = default is MISSING
    entry = InputField(check, None if required else default, read or (lambda value: value), required)
    metadata = {"input": entry}
    if required or read is None:
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: read(default), metadata=metadata)


_EXTEND = record(dict.fromkeys(("left", "top", "right", "bottom"), whole(0, MAX_SIDE, SIDE_STEP)))


def _none_if_empty(value: str | None) -> str | None:
    return value or None


def _prompts(value: list[str] | None) -> tuple[str, ...]:
    return tuple(value or ())


def _seeds(value: list[int] | None) -> tuple[int, ...]:
    return tuple(_seed(seed) for seed in value or ())


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


def _extend_or_none(value: dict[str, int] | None) -> Extend | None:
    return Extend(**value) if value and any(value.values()) else None


def _tuple(value: list[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _seed(value: int | None) -> int:
    return secrets.randbits(RANDOM_SEED_BITS) if value in (None, -1) else value


@dataclass(frozen=True)
class GenerationRequest:
    """A validated job: the one list of the input's fields, in the order of the documentation.

    Sizes are in pixels. A negative_prompt of None gives another picture than "". `prompts` and `seeds` are one for each
    picture: the former stand in place of `prompt`, and the first of the latter is `seed`. No seed is negative.
    `scheduler` and `schedule_type` are the names of the tables in schedulers.py. Where there are `timesteps`,
    `num_inference_steps` is their number. An `eta` of None is the sampler's own. `strength` is used with a picture or a
    refiner only. `cfg_end` is the share of the steps after which there is no guidance. The UNet's deep blocks run at
    every `deep_cache`-th step. `image` means the same as `image_url`, and `mask` as `mask_url`; width and height are
    the answer's, `extend` included. `loras` and `embeddings` are the usable entries; `..._requested` says that the
    request had some, usable or not; `given` names the input's fields that it did not leave out or null; `refiner` is
    the name of the worker's refiner, empty where it has none; `values` is what the rules between fields look at. Values
    made directly are not checked.
    """

    prompt: str = _input(or_null(text(MAX_PROMPT_CHARACTERS)), None, lambda value: value or "")
    negative_prompt: str | None = _input(or_null(text(MAX_PROMPT_CHARACTERS)), None)
    prompts: tuple[str, ...] = _input(or_null(several(text(MAX_PROMPT_CHARACTERS), MAX_IMAGES)), None, _prompts)
    prompt_syntax: str | None = _input(or_null(choice(PROMPT_SYNTAXES)), None)
    prompt_emphasis: str = _input(choice(EMPHASIS_RULES), "original")
    clip_skip: int = _input(whole(1, MAX_CLIP_SKIP), DEFAULT_CLIP_SKIP)
    inspect_prompt: bool = _input(switch(), False)
    height: int = _input(whole(MIN_SIDE, MAX_SIDE, SIDE_STEP), 1024)
    width: int = _input(whole(MIN_SIDE, MAX_SIDE, SIDE_STEP), 1024)
    seed: int = _input(or_null(whole(-1, MAX_SEED)), None, _seed)
    seeds: tuple[int, ...] = _input(or_null(several(whole(-1, MAX_SEED), MAX_IMAGES)), None, _seeds)
    scheduler: str = _input(spelled(scheduler_names(), find_scheduler), "K_EULER_ANCESTRAL")
    schedule_type: str = _input(spelled(schedule_names(), find_schedule), AUTOMATIC)
    num_inference_steps: int = _input(whole(1, MAX_STEPS), 28)
    timesteps: tuple[int, ...] | None = _input(or_null(falling(0, MAX_TIMESTEP, MAX_STEPS)), None, _tuple)
    eta: float | None = _input(or_null(number(0, 1)), None)
    guidance_scale: float = _input(number(0, MAX_GUIDANCE), 5.5, float)
    guidance_rescale: float = _input(number(0, 1), 0.0, float)
    cfg_end: float = _input(number(0, 1), 1.0, float)
    deep_cache: int = _input(whole(1, MAX_DEEP_CACHE), 1)
    num_images: int = _input(whole(1, MAX_IMAGES), 1)
    image_url: str | None = _input(or_null(picture()), None, _none_if_empty)
    image: str | None = _input(or_null(picture()), None, _none_if_empty)
    mask_url: str | None = _input(or_null(picture()), None, _none_if_empty)
    mask: str | None = _input(or_null(picture()), None, _none_if_empty)
    mask_blur: float = _input(number(0, MAX_MASK_BLUR), 4.0, float)
    invert_mask: bool = _input(switch(), False)
    inpaint_full_res: bool = _input(switch(), False)
    inpaint_padding: int = _input(whole(0, MAX_INPAINT_PADDING), 32)
    extend: Extend | None = _input(or_null(_EXTEND), None, _extend_or_none)
    strength: float | None = _input(or_null(number(0, 1)), None, _float_or_none)
    hires: Hires | None = _input(or_null(hires_check(MAX_STEPS)), None, as_hires)
    refiner_inference_steps: int | None = _input(or_null(whole(0, 1000)), None)
    high_noise_frac: float | None = _input(or_null(number(0, 1)), None)
    loras: tuple[LoraSpec, ...] = _input(or_null(reference_list(MAX_LORAS)), None, lambda _: ())
    embeddings: tuple[EmbeddingSpec, ...] = _input(or_null(reference_list(MAX_EMBEDDINGS)), None, lambda _: ())
    output_format: str = _input(choice(OUTPUT_FORMATS), "png")
    output_quality: int = _input(whole(1, 100), 90)
    preview: bool = _input(switch(), False)
    loras_requested: bool = False
    embeddings_requested: bool = False
    given: frozenset[str] = frozenset()
    refiner: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    def prompt_of(self, index: int) -> str:
        """The prompt of picture `index`."""
        return self.prompts[index] if self.prompts else self.prompt

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the answer's pictures, which are the largest that are drawn."""
        return self.hires.size(self.width, self.height) if self.hires else (self.width, self.height)

    @property
    def pictures(self) -> dict[str, tuple[str, str]]:
        """The pictures that the request brings, by the names of PICTURE_FIELDS: the field and what it holds."""
        held = ((name, field, getattr(self, field)) for name, of in PICTURE_FIELDS.items() for field in of)
        return {name: (field, reference) for name, field, reference in held if reference}

    @property
    def starts_from_picture(self) -> bool:
        """True for everything but text-to-image."""
        return "image_url" in self.pictures

    @property
    def is_inpainting(self) -> bool:
        """True when a part of the picture, or what lies beyond it, is drawn."""
        return "mask_url" in self.pictures or self.extend is not None

    @property
    def denoising_strength(self) -> float:
        """`strength`, or what it is when the request does not say."""
        if self.strength is not None:
            return self.strength
        return default_strength(masked="mask_url" in self.pictures, extended=self.extend is not None)


# The pictures that a request may bring, each by the name that the worker has for it, with the fields that may hold it.
PICTURE_FIELDS: dict[str, tuple[str, ...]] = {"image_url": ("image_url", "image"), "mask_url": ("mask_url", "mask")}

# The fields with an entry for each picture.
PER_PICTURE = ("prompts", "seeds")

# The input's fields by name.
FIELDS: dict[str, InputField] = {
    entry.name: entry.metadata["input"] for entry in fields(GenerationRequest) if "input" in entry.metadata
}
