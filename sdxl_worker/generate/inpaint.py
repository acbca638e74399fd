"""Draw a part of a picture, or what lies beyond it: the mask, the crop around it, and the way back into the picture.

Where the mask is black, the answer has the picture's own pixels, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import Extend, GenerationRequest

Box = tuple[int, int, int, int]

# The answer of inpaint_full_res is as large as the picture, and a request may want several.
MAX_FULL_RES_PIXELS = 2**24
# What lies around a mask is cut out in the request's shape, of which the picture may hold a thin strip.
MAX_CROP_PIXELS = 2**26
# A JPEG's black and white differ from 0 and 255 by about as much.
_BLACK, _WHITE = 16, 239
# Half of white: from here on diffusers redraws a pixel.
_REDRAWN = 128
# So much of the picture beside an extension is drawn anew, for a seam without an edge: four latents.
_OVERLAP = 32
# What is mirrored beyond the picture's edge is to give colours, not things.
_MIRROR_BLUR = 16


def made_ready(request: GenerationRequest, pictures: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """The picture (RGB) as the answer keeps it, and the mask (8-bit grey) with which it is drawn over: of one size.

    `pictures` are those of the request, in these modes and of any size. 255 in the mask is drawn, 0 is kept, and what
    lies between is mixed. Raises InvalidRequest for a mask that leaves nothing to draw, and for a picture that is too
    large.
    """
    image = pictures["image_url"]
    mask = _fitting_mask(request, pictures["mask_url"], image.size) if "mask_url" in pictures else None
    if request.inpaint_full_res:
        _check_size(request, image)
    else:
        extend = request.extend or Extend()
        size = (request.width - extend.width, request.height - extend.height)
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        # Lanczos would ring, and change pixels beside the mask.
        mask = mask and ImageOps.fit(mask, size, Image.Resampling.BILINEAR)
    mask = mask or Image.new("L", image.size, 0)
    if request.extend:
        image, mask = _beyond(image, request.extend), _mask_beyond(mask, request.extend)
    mask = mask.filter(ImageFilter.GaussianBlur(request.mask_blur))
    ready = {"image_url": image, "mask_url": mask}
    if request.inpaint_full_res:
        _check_box(request, mask)
    # As diffusers takes them: one pixel for each latent.
    if not (np.asarray(arguments(request, ready)["mask_image"])[::8, ::8] >= _REDRAWN).any():
        field = request.pictures.get("mask_url", ("mask_url", ""))[0]
        raise InvalidRequest(
            f"{field} leaves nothing to redraw: white is redrawn (invert_mask turns it round), and what is thinner "
            "than 8 pixels or mask_blur is lost"
        )
    return ready


def arguments(request: GenerationRequest, inputs: Mapping[str, Image.Image]) -> dict[str, Any]:
    """Those of StableDiffusionXLInpaintPipeline; `inputs` are ready ones."""
    image, mask, size = inputs["image_url"], inputs["mask_url"], (request.width, request.height)
    if request.inpaint_full_res:
        box = crop_box(mask, request.inpaint_padding, size)
        image = _cropped(image, box).resize(size, Image.Resampling.LANCZOS)
        mask = mask.crop(box).resize(size, Image.Resampling.BILINEAR)
    strength = request.denoising_strength
    return {"image": image, "mask_image": mask, "width": size[0], "height": size[1], "strength": strength}


def finished(request: GenerationRequest, inputs: Mapping[str, Image.Image]) -> Image.Image | None:
    """The picture itself where none of it is redrawn."""
    return inputs["image_url"] if request.denoising_strength == 0 else None


def completed(drawn: Image.Image, request: GenerationRequest, inputs: Mapping[str, Image.Image]) -> Image.Image:
    """The picture with what was drawn in place of what is masked."""
    image, mask = inputs["image_url"], inputs["mask_url"]
    if request.inpaint_full_res:
        left, top, right, bottom = crop_box(mask, request.inpaint_padding, drawn.size)
        part, drawn = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), image.copy()
        drawn.paste(part, (left, top))
    return Image.composite(drawn, image, mask)


def crop_box(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The box around all that is masked and `padding` pixels more, in the ratio of `size` (width, height).

    It lies inside the picture where that has room for it, else around its middle.
    """
    there = mask.getbbox() or (0, 0, *mask.size)
    starts = [max(edge - padding, 0) for edge in there[:2]]
    ends = [min(edge + padding, room) for edge, room in zip(there[2:], mask.size, strict=True)]
    width, height = (end - start for start, end in zip(starts, ends, strict=True))
    wanted = (max(width, round(height * size[0] / size[1])), max(height, round(width * size[1] / size[0])))
    left, top = map(_start, starts, (width, height), wanted, mask.size)
    return left, top, left + wanted[0], top + wanted[1]


def _start(start: int, length: int, wanted: int, room: int) -> int:
    """Where `wanted` pixels around these `length` ones begin."""
    if wanted > room:
        return (room - wanted) // 2
    return min(max(start - (wanted - length) // 2, 0), room - wanted)


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    """What the box holds of an RGB picture; outside of it, the picture's edge goes on."""
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    beyond = [(inside[axis] - box[axis], box[axis + 2] - inside[axis + 2]) for axis in (1, 0)]
    return Image.fromarray(np.pad(np.asarray(image.crop(inside)), (*beyond, (0, 0)), mode="edge"))


def _check_size(request: GenerationRequest, image: Image.Image) -> None:
    if image.width * image.height > MAX_FULL_RES_PIXELS:
        field = request.pictures["image_url"][0]
        raise InvalidRequest(
            f"{field} leads to a picture of more than {MAX_FULL_RES_PIXELS} pixels, and with inpaint_full_res the "
            "answer is as large"
        )


def _check_box(request: GenerationRequest, mask: Image.Image) -> None:
    left, top, right, bottom = crop_box(mask, request.inpaint_padding, (request.width, request.height))
    if (right - left) * (bottom - top) > MAX_CROP_PIXELS:
        raise InvalidRequest(
            f"inpaint_full_res would cut out {right - left} x {bottom - top} pixels around the mask, and at most "
            f"{MAX_CROP_PIXELS} are possible: give width and height more of the mask's shape"
        )


def _fitting_mask(request: GenerationRequest, mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask over a picture of that size, with clean black and white, as the request wants it."""
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    mask = mask.point([0 if value < _BLACK else 255 if value > _WHITE else value for value in range(256)])
    return ImageOps.invert(mask) if request.invert_mask else mask


def _beyond(image: Image.Image, extend: Extend) -> Image.Image:
    """The picture with its mirror image, blurred, where it is extended."""
    pads = ((extend.top, extend.bottom), (extend.left, extend.right), (0, 0))
    mirrored = Image.fromarray(np.pad(np.asarray(image), pads, mode="symmetric"))
    larger = mirrored.filter(ImageFilter.GaussianBlur(_MIRROR_BLUR))
    larger.paste(image, (extend.left, extend.top))
    return larger


def _mask_beyond(mask: Image.Image, extend: Extend) -> Image.Image:
    """The mask of a picture, with what lies beyond it and a little of it beside that."""
    larger = Image.new("L", (mask.width + extend.width, mask.height + extend.height), 255)
    across, down = min(_OVERLAP, mask.width // 4), min(_OVERLAP, mask.height // 4)
    left, top = across if extend.left else 0, down if extend.top else 0
    right, bottom = across if extend.right else 0, down if extend.bottom else 0
    kept = mask.crop((left, top, mask.width - right, mask.height - bottom))
    larger.paste(kept, (extend.left + left, extend.top + top))
    return larger
