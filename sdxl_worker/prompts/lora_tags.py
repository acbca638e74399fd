"""The LoRAs that tags in a prompt name: `<lora:REFERENCE:WEIGHT>`, as AUTOMATIC1111 and Forge read them.

Two numbers are the text encoders' and the UNet's scale, in that order, and `te=` and `unet=` name them
(extensions-builtin/Lora/extra_networks_lora.py in both). `start=` and `end=` are this worker's own: they leave out what
they do not know.
"""

from __future__ import annotations

import dataclasses
import re

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.masking import mask
from sdxl_worker.prompts.parse import Tag, parse
from sdxl_worker.prompts.reading import NEGATIVE, syntax_of, texts_of
from sdxl_worker.request import MAX_LORAS, GenerationRequest, LoraSpec
from sdxl_worker.request.lora_entries import parse_lora_entries

_NUMBER = re.compile(
    r"\s*(?:(te|unet|start|end)\s*=\s*)?([+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?)\s*"
)
# `civitai:12345` is a reference and not the name "civitai" with a weight.
_NEEDS_MORE = frozenset({"civitai", "https", "http"})


def with_lora_tags(request: GenerationRequest) -> GenerationRequest:
    """The request with the LoRAs of its prompt's tags after those of `loras`; the prompt stays as it is.

    A weight out of range is a skipped tag, named in `warnings`. Raises InvalidRequest for tags in the negative prompt,
    for `prompts` that do not have the same ones, and for too many LoRAs.
    """
    tags = {
        name: [tag for tag in _tags_of(text, syntax_of(request), name) if tag.kind == "lora"]
        for name, text in texts_of(request).items()
    }
    if unwanted := tags.pop(NEGATIVE, None):
        raise InvalidRequest(
            f"negative_prompt holds the tag {_label(unwanted[0])}: LoRAs are named in prompt or in loras"
        )
    (first, of_all), *others = tags.items()
    for name, found in others:
        if [tag.body for tag in found] != [tag.body for tag in of_all]:
            raise InvalidRequest(f"{name} has other lora tags than {first}: one set of LoRAs is for all pictures")
    if not of_all:
        return request
    specs: list[LoraSpec] = []
    warnings = list(request.warnings)
    for tag in of_all:
        named, skipped = _spec_of(tag)
        specs += named
        warnings += skipped
    number = len(request.loras) + len(specs)
    if number > MAX_LORAS:
        raise InvalidRequest(f"loras and the tags in prompt name {number} LoRAs and may name at most {MAX_LORAS}")
    return dataclasses.replace(request, loras=(*request.loras, *specs), loras_requested=True, warnings=tuple(warnings))


def _tags_of(text: str, syntax: str, name: str) -> tuple[Tag, ...]:
    try:
        return parse(text, syntax).tags
    except InvalidRequest as error:
        raise InvalidRequest(f"{name} {error}") from None


def _spec_of(tag: Tag) -> tuple[list[LoraSpec], list[str]]:
    """The LoRA that the tag names, or why it is skipped."""
    reference, numbers = split_body(tag.body)
    text = numbers.get("te", 1.0)
    unet = numbers.get("unet", text)
    scale = unet if unet == text else {"unet": unet, "text_encoder": text, "text_encoder_2": text}
    span = {name: numbers[name] for name in ("start", "end") if name in numbers}
    specs, warnings = parse_lora_entries([{"path": reference, "scale": scale, **span}])
    label = _label(tag)
    named = [dataclasses.replace(spec, tag=label) for spec in specs]
    return named, [f"the tag {label}{warning.removeprefix('loras[0]')}" for warning in warnings]


def split_body(body: str) -> tuple[str, dict[str, float]]:
    """(reference, numbers by name): split off from the right, since URLs hold colons.

    Up to two numbers without a name are "te" and "unet" in that order, where no name gives these.
    """
    parts = body.split(":")
    named: dict[str, float] = {}
    plain: list[float] = []
    while len(parts) > 1 and parts[-2].strip().lower() not in _NEEDS_MORE:
        match = _NUMBER.fullmatch(parts[-1])
        if match is None or match[1] in named or (match[1] is None and len(plain) == 2):
            break
        if match[1]:
            named[match[1]] = float(match[2])
        else:
            plain.insert(0, float(match[2]))
        parts.pop()
    return ":".join(parts).strip(), {**dict(zip(("te", "unet"), plain, strict=False)), **named}


def _label(tag: Tag) -> str:
    """The tag as it may be shown: a URL in it without its query."""
    return f"<lora:{mask(split_body(tag.body)[0])}>"
