"""What has to hold between the fields of a request that are about pictures: image, mask and what is drawn of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sdxl_worker.request.fields import FIELDS, MAX_SIDE, PICTURE_FIELDS
from sdxl_worker.request.values import Extend, default_strength

# What is of no use without another field, by that field's name.
_NEEDED = {
    "mask_url": ("invert_mask", "inpaint_full_res"),
    "inpaint_full_res": ("inpaint_padding",),
}


def resolved(values: Mapping[str, Any], bad: Collection[str]) -> dict[str, Any]:
    """The input's values with the width and height that the answer has, and with a strength.

    `extend` adds to both sides; `bad` are the fields that are wrong on their own.
    """
    found = dict(values)
    extended = bool(_extend(values, bad))
    if extended and not {"width", "height"} & set(bad):
        extend = Extend(**values["extend"])
        found |= {"width": values["width"] + extend.width, "height": values["height"] + extend.height}
    if values["strength"] is None:
        found["strength"] = default_strength(masked=bool(_given_of(values, "mask_url")), extended=extended)
    return found


def starts_from_picture(values: Mapping[str, Any]) -> bool:
    """True for everything but text-to-image."""
    return bool(_given_of(values, "image_url"))


def is_inpainting(values: Mapping[str, Any]) -> bool:
    """True when a part of a picture, or what lies beyond it, is drawn."""
    return bool(_given_of(values, "mask_url") or _extend(values))


def problems(values: Mapping[str, Any], bad: Collection[str], *, by_base_model: bool = True) -> list[str]:
    """What is wrong with fields that are each good on their own; `values` are `resolved`.

    `by_base_model`: a picture to start from is drawn by the base model, in its steps.
    """
    given = {name: _given_of(values, name) for name in PICTURE_FIELDS}
    found = [f"{' and '.join(of)} mean the same: give one of them" for of in given.values() if len(of) > 1]
    image, extend = given["image_url"], _extend(values, bad)
    if not image:
        found += [f"{name} needs image_url, the picture that it is for" for name in (*given["mask_url"], *extend)]
    if extend and values["inpaint_full_res"]:
        found.append("extend and inpaint_full_res do not go together: inpaint in a second request")
    if values["hires"] is not None and "hires" not in bad:
        found += [
            f"hires and {name} do not go together: its second pass draws the whole picture"
            for name in (*given["mask_url"], *extend)
        ]
        if image and values["strength"] == 0:
            found.append(f"strength must be above 0 with {image[0]} and hires, whose first pass it is")
    if extend and not {"width", "height"} & set(bad):
        too_long = [side for side in ("width", "height") if values[side] > MAX_SIDE]
        found += [f"{side} with extend is {values[side]} and must be at most {MAX_SIDE}" for side in too_long]
    if image and by_base_model and not {*image, "num_inference_steps", "strength"} & set(bad):
        steps, strength = values["num_inference_steps"], values["strength"]
        if strength > 0 and int(steps * strength) < 1:
            found.append(f"num_inference_steps x strength must be at least 1 with {image[0]}; strength is {strength:g}")
    return found


def ignored(values: Mapping[str, Any], raw: Mapping[str, Any], *, strength_counts: bool = False) -> list[str]:
    """A sentence for each field that was given and has no effect; `strength_counts` without a picture too.

    One that says what it is anyway, as forms do that send every field, asks for nothing.
    """
    there = {name: bool(_given_of(values, name)) for name in PICTURE_FIELDS}
    there["inpaint_full_res"] = values["inpaint_full_res"]
    asked = {name: raw.get(name, field.default) != field.default for name, field in FIELDS.items()}
    has_effect = there["image_url"] or strength_counts or raw.get("strength") is None
    found = [] if has_effect else ["strength has no effect without image_url"]
    for needed, names in _NEEDED.items():
        found += [f"{name} has no effect without {needed}" for name in names if asked[name] and not there[needed]]
    if asked["mask_blur"] and not there["mask_url"] and not _extend(values):
        found.append("mask_blur has no effect without mask_url or extend")
    return found


def _given_of(values: Mapping[str, Any], picture: str) -> list[str]:
    """Which of the fields that may hold this picture do."""
    return [field for field in PICTURE_FIELDS[picture] if values[field]]


def _extend(values: Mapping[str, Any], bad: Collection[str] = ()) -> list[str]:
    """The name of `extend`, where it adds anything."""
    extend = values["extend"]
    adds = any(extend.values()) if isinstance(extend, dict) else bool(extend)
    return ["extend"] if adds and "extend" not in bad else []
