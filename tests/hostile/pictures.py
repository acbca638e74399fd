"""Input pictures that are broken, odd, or made to cost time and memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from random import Random

from PIL import Image

from tests.hostile.case import Case, damaged, job, noise
from tests.support.http_server import whole

Made = tuple[str, bytes]
# Format -> the modes that it can be saved in.
MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "1"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "I;16", "F", "RGB", "CMYK", "LAB", "I"),
    "PPM": ("L", "RGB"),
}

SIDES = ((1, 2**26), (2**26, 1), (1, 2**31 - 1), (70_000, 1), (8192, 8192), (60_000, 60_000), (0, 5))
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0")


def saved(random: Random, kind: str = "", mode: str = "", **options: object) -> bytes:
    """A small picture of noise in some format and mode."""
    kind = kind or random.choice(list(MODES))
    mode = mode or random.choice(MODES[kind])
    width, height = random.choice(((1, 1), (1, 300), (17, 5), (64, 64), (640, 9)))
    picture = Image.frombytes("L", (width, height), noise(random, width * height))
    if mode == "F":
        picture = picture.convert("F")
    elif mode in ("I", "I;16"):
        picture = picture.convert("I").point(lambda value: value * 257).convert(mode)
    elif mode != "L":
        picture = picture.convert("RGB").convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _odd_mode(random: Random) -> Made:
    kind = random.choice(list(MODES))
    mode = random.choice(MODES[kind])
    return f"{kind} {mode}", saved(random, kind, mode)


def _damaged(random: Random) -> Made:
    kind = random.choice(list(MODES))
    what, content = damaged(random, saved(random, kind))
    return f"{kind} {what}", content


def _exif(random: Random) -> Made:
    entries = b"".join(
        struct.pack("<HHII", random.choice((0x112, 0x8769, 0x9286, 0x8825, 7)), random.randrange(14), *_numbers(random))
        for _ in range(random.choice((1, 3, 200)))
    )
    block = random.choice(
        (
            b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries,
            b"Exif\0\0II*\0" + struct.pack("<I", random.choice((0, 8, 2**32 - 1))) + entries,
            b"Exif\0\0" + noise(random, 40),
            b"",
        )
    )
    return f"EXIF {len(block)}", saved(random, random.choice(("JPEG", "PNG", "WEBP")), "RGB", exif=block)


def _numbers(random: Random) -> tuple[int, int]:
    return random.choice((1, 0, 4, 2**31, 2**32 - 1)), random.choice((1, 0, 6, 9, 8, 2**32 - 1))


def _animated(random: Random) -> Made:
    kind = random.choice(("GIF", "WEBP", "PNG", "TIFF"))
    frames = [Image.frombytes("RGB", (16, 16), noise(random, 768)) for _ in range(random.choice((2, 60)))]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return f"animated {kind}", buffer.getvalue()


def png(width: int, height: int, rows: bytes, *extra: tuple[bytes, bytes], depth: int = 1, colour: int = 0) -> bytes:
    """A PNG by hand: `rows` are its compressed pixels, `extra` chunks come before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *extra, (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def _huge_side(random: Random) -> Made:
    width, height = random.choice(SIDES)
    pixels = zlib.compress(bytes(min(8_400_000, (width // 8 + 1) * height)), 9)
    return f"PNG {width} x {height}", png(width, height, pixels)


def _chunks(random: Random) -> Made:
    bomb = zlib.compress(bytes(random.choice((1000, 30_000_000))), 9)
    name = random.choice((b"zTXt", b"iCCP", b"iTXt", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"gAMA", b"pHYs"))
    body = random.choice((b"k\0\0" + bomb, b"k\0\1\0\0\0" + bomb, noise(random, random.randrange(40)), b""))
    chunks = [(name, body)] * random.choice((1, 50))
    return f"PNG {name.decode()} {len(body)}", png(8, 8, zlib.compress(bytes(16)), *chunks)


def _scans(random: Random) -> Made:
    """A progressive JPEG that sends its scans again and again: each one decodes the whole picture."""
    buffer = io.BytesIO()
    side = random.choice((64, 1000))
    Image.new("RGB", (side, side), (200, 90, 30)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    first, repeats = content.index(b"\xff\xda"), random.choice((2, 60, 600))
    scans = content[first:-2] * repeats
    return f"JPEG with {repeats} times its scans, {side} wide", content[:first] + scans + b"\xff\xd9"


def _other(random: Random) -> Made:
    return random.choice(
        (
            ("HTML", b"<!doctype html><title>404</title>"),
            ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'),
            ("PDF", b"%PDF-1.7\n"),
            ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n"),
            ("empty", b""),
            ("noise", noise(random, 5000)),
            ("magic alone", random.choice(MAGIC)),
        )
    )


_KINDS: tuple[tuple[int, Callable[[Random], Made]], ...] = (
    (3, _odd_mode),
    (6, _damaged),
    (4, _exif),
    (1, _animated),
    (1, _huge_side),
    (2, _chunks),
    (1, _scans),
    (2, _other),
)


def make(random: Random, host: str) -> Case:
    """One picture, as the input of image-to-image."""
    (kind,) = random.choices([kind for _, kind in _KINDS], [weight for weight, _ in _KINDS])
    what, content = kind(random)
    strength = random.choice((0, 0.5, 1))
    fields = job(image_url=f"{host}/picture", strength=strength, num_inference_steps=2)
    return Case(f"{what}, strength {strength}", fields, {"/picture": [whole(content)]})
