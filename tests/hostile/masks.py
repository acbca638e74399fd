"""Pictures and masks that a request brings along: broken data URIs, odd masks, and odd wishes."""

from __future__ import annotations

import base64
import io
from random import Random
from typing import Any

from PIL import Image

from tests.hostile import pictures
from tests.hostile.case import SECRET, Case, damaged, job, noise, words

TYPES = ("image/png", "image/jpeg", "text/html", "image/svg+xml", "x", "", "a" * 200, "a" * 300)
HEADERS = words("""
    data: data:, data:image/png data:image/png, data:;base64 data:;base64, DATA:;BASE64, data:image/png;base64;charset=x
    data:;;;;;;base64, data:;a=b;base64, data:base64, data:image/png;base64,data:image/png;base64, blob:;base64,
""")


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """`content` brought along in a request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _broken(random: Random, content: bytes) -> tuple[str, str]:
    """A data URI that is not well formed, or odd but well formed."""
    body = base64.b64encode(content).decode()
    at = random.randrange(len(body) + 1)
    kind = random.choice(("cut", "padded", "url alphabet", "inserted", "wrapped", "header", "percent", "type", "large"))
    if kind == "cut":
        return kind, data_uri(content)[: random.randrange(1, 200)]
    if kind == "padded":
        return kind, f"data:;base64,{body}{'=' * random.choice((1, 3, 5000))}"
    if kind == "url alphabet":
        return kind, f"data:;base64,{body.replace('+', '-').replace('/', '_')}"
    if kind == "inserted":
        piece = random.choice(("\0", "\ud800", "é", "\x0b", "=", "%", SECRET, "AAA", "\n" * 1000))
        return kind, f"data:;base64,{body[:at]}{piece}{body[at:]}"
    if kind == "wrapped":
        return kind, "data:;base64," + base64.encodebytes(content).decode()
    if kind == "header":
        return kind, random.choice(HEADERS) + body
    if kind == "percent":
        return kind, f"data:image/png;base64,{body.replace('=', '%3D')}"
    if kind == "type":
        return kind, data_uri(content, random.choice(TYPES))
    return kind, "data:;base64," + "A" * random.choice((3_000_000, 44_000_000, 60_000_000))


def _mask(random: Random) -> tuple[str, bytes]:
    """A mask of some size and shade."""
    size = random.choice(((64, 64), (1, 1), (64, 1), (1, 3000), (300, 200), (4097, 4096), (16_384, 3)))
    shade = random.choice((0, 1, 127, 128, 254, 255))
    mask = Image.new(random.choice(("L", "1", "P", "RGB", "RGBA", "LA", "I;16")), size)
    what = random.choice(("box", "noise", "flat"))
    if what == "box" and mask.mode != "I;16":
        filled = Image.new("L", (max(1, size[0] // 3), max(1, size[1] // 3)), shade)
        mask.paste(filled.convert(mask.mode), (random.randrange(size[0]), random.randrange(size[1])))
    elif what == "noise" and size[0] * size[1] < 100_000:
        mask = Image.frombytes("L", size, noise(random, size[0] * size[1]))
    elif mask.mode in ("L", "P"):
        mask.paste(shade, (0, 0, *size))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return f"{what} {mask.mode} {size} {shade}", buffer.getvalue()


def _how(random: Random) -> dict[str, Any]:
    """What is to be done with the mask."""
    fields: dict[str, Any] = {"strength": random.choice((None, 0, 0.5, 1)), "num_inference_steps": 2}
    if random.random() < 0.7:
        fields["mask_blur"] = random.choice((0, 0.1, 4, 64))
        fields["invert_mask"] = random.random() < 0.5
    if random.random() < 0.5:
        fields |= {"inpaint_full_res": True, "inpaint_padding": random.choice((0, 32, 256))}
    if random.random() < 0.2:
        sides = random.choice(({"left": 64}, {"top": 8, "bottom": 8}, {"right": 1984}, {"left": 0}, {"left": -8}))
        fields["extend"] = random.choice((sides, {}, {"left": 8, "": 8}, {"left": "8"}, [8], "8", {"top": 2048}))
    return fields


def make(random: Random, _host: str) -> Case:
    """A request that redraws a part of a picture, with something wrong or odd about it."""
    picture = pictures.saved(random, "PNG", random.choice(("L", "RGB", "RGBA")))
    what, content = _mask(random)
    fields = {"image": data_uri(picture), "mask": data_uri(content), **_how(random)}
    fault = random.choice(("none", "none", "damaged", "data URI", "data URI", "image", "left out"))
    if fault == "damaged":
        how, content = damaged(random, content)
        what, fields["mask"] = f"{what} {how}", data_uri(content)
    elif fault == "data URI":
        how, fields[random.choice(("image", "mask"))] = _broken(random, content)
        what = f"{what} {how}"
    elif fault == "image":
        fields["image"], fields["mask"] = fields["mask"], fields["image"]
    elif fault == "left out":
        del fields[random.choice(("image", "mask"))]
    shown = {name: value for name, value in fields.items() if name not in ("image", "mask")}
    return Case(f"{fault}: {what} {shown}", job(**fields), served=False)
