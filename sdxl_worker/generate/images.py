"""Pictures on their way out: encoded with their text, wrapped as data URIs, saved for a local run."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    import torch

# Pillow's default of 6 takes almost four times as long for an eighth less (bench/overhead.py measures the levels).
PNG_LEVEL = 1
# Pillow's default of 4 takes twice as long for the same size.
WEBP_METHOD = 2
# One EXIF block of a JPEG holds 64 kB; a longer text is left out rather than cut.
MAX_EXIF_BYTES = 65_000
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


def pictures_in(pixels: torch.Tensor) -> list[Image.Image]:
    """The RGB pictures in `pixels` (n, 3, height, width), finite values from 0 to 1, as diffusers rounds them."""
    import torch

    from sdxl_worker.transfers import fetched

    # Made whole numbers where they are: a quarter to copy, and no arithmetic for the CPU while the device waits.
    values = (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(picture) for picture in fetched(values)().numpy()]


@dataclass(frozen=True)
class EncodedImage:
    """One picture as file bytes; `suffix` is a file name's end, `mime` its media type, `seed` the one that drew it."""

    data: bytes
    suffix: str
    mime: str
    seed: int

    @property
    def data_uri_length(self) -> int:
        """How many characters `data_uri` has, without making it."""
        return len(f"data:{self.mime};base64,") + 4 * ((len(self.data) + 2) // 3)

    def data_uri(self) -> str:
        """The picture as a `data:` URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode('ascii')}"


def encode(image: Image.Image, seed: int, text: str, format_name: str = "png", quality: int = 90) -> EncodedImage:
    """`image` as png, jpeg or webp bytes that carry `text`; png is lossless, `quality` (1-100) is for the others."""
    options = _SAVE_OPTIONS[format_name](text, quality)
    buffer = io.BytesIO()
    image.save(buffer, format=format_name.upper(), **options)
    return EncodedImage(buffer.getvalue(), f".{format_name}", f"image/{format_name}", seed)


def _png_options(text: str, _quality: int) -> dict[str, Any]:
    info = PngInfo()
    # Pillow writes tEXt where Latin-1 is enough, else UTF-8 in iTXt.
    info.add_text("parameters", text)
    return {"pnginfo": info, "compress_level": PNG_LEVEL}


def _jpeg_options(text: str, quality: int) -> dict[str, Any]:
    return {"quality": quality, **_exif(text)}


def _webp_options(text: str, quality: int) -> dict[str, Any]:
    return {"quality": quality, "method": WEBP_METHOD, **_exif(text)}


_SAVE_OPTIONS = {"png": _png_options, "jpeg": _jpeg_options, "webp": _webp_options}


def _exif(text: str) -> dict[str, Any]:
    """EXIF UserComment in UTF-16, where A1111 writes and reads it for JPEG and WebP."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    block = exif.tobytes()
    return {"exif": block} if len(block) <= MAX_EXIF_BYTES else {}


def save_locally(encoded: Sequence[EncodedImage], folder: Path, job_id: str) -> list[Path]:
    """Write the pictures into `folder` (created if missing) as `<job id>_<seed><suffix>` and return their paths.

    The second one of the same seed is called `<job id>_<seed>_2<suffix>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w\-]+", "_", job_id)[:60] or "job"
    paths: list[Path] = []
    for index, image in enumerate(encoded):
        number = sum(1 for earlier in encoded[: index + 1] if earlier.seed == image.seed)
        path = folder / f"{stem}_{image.seed}{f'_{number}' if number > 1 else ''}{image.suffix}"
        path.write_bytes(image.data)
        paths.append(path)
    return paths
