"""A picture from outside -> upright RGB, with sides, scans, time and memory bounded before and while it is unpacked."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from sdxl_worker.errors import InvalidRequest, WorkerError

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 2**20
# Pillow keeps a pointer and a padded buffer for every row: 67 million rows of one pixel take 2 GB.
MAX_SIDE = 2**14
# A camera's or editor's progressive JPEG has about ten; each goes through the whole picture, whatever it adds to it.
MAX_SCANS = 100
TIMEOUT_S = 10.0
# TIFF is read in one call that nothing can stop, and a JPEG inside may hold any number of scans.
_JPEG_IN_TIFF = frozenset({"jpeg", "tiff_jpeg"})
# Every chunk of a PNG and every strip of a TIFF becomes Python objects of hundreds of bytes, however small it is.
MAX_HEADER_READS = 20_000
MAX_READS = 1_000_000
MAX_TIFF_HEADER = 2**20
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _ORIENTATION = 0x0102, 0x0106, 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A marker of a JPEG is 0xFF and a byte that neither stuffs it (0), stands alone (01, D0 to D8) nor fills (FF).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_EOI, _SOS = 0xD9, 0xDA


def read_input_image(
    data: bytes, check_stop: Callable[[], None] | None = None, field: str = "image_url"
) -> Image.Image:
    """The first picture in `data` as upright RGB; 16-bit grey and floats in [0, 1] are rescaled to 8 bits.

    `check_stop` is called again and again while the picture is unpacked; what it raises ends that. Raises
    InvalidRequest, beginning with `field`, for what is not a picture, and for one that is too large, too slow, broken
    or of unknown range.
    """
    return _read(data, check_stop, field, lambda image: image.convert("RGB"))


def read_mask(data: bytes, check_stop: Callable[[], None] | None = None, field: str = "mask_url") -> Image.Image:
    """The first picture in `data` as upright 8-bit grey; of one with transparent parts, how opaque each pixel is.

    That is how AUTOMATIC1111 reads a mask. Raises like `read_input_image`.
    """
    return _read(data, check_stop, field, _opacity_or_grey)


def _opacity_or_grey(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        # Copied only where it has to be: these are 4 bytes for each of up to 64 million pixels.
        opacity = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
        if opacity.getextrema() != (255, 255):
            return opacity
    return (image if image.mode in ("RGB", "RGBA") else image.convert("RGB")).convert("L")


def _read(
    data: bytes, check_stop: Callable[[], None] | None, field: str, converted: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    # Pillow warns once for each of 65,535 broken tags. For the whole process: catch_warnings is not safe in threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        picture = converted(_unpacked(data, check_stop, field))
        # A colour profile, a transparency or a place on earth would be saved with the answer of strength 0.
        picture.info.clear()
        return picture
    except InvalidRequest as error:
        raise InvalidRequest(f"{field} {error}") from None
    except WorkerError:
        raise
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{field} {_too_large()}") from None
    except Image.UnidentifiedImageError:
        raise InvalidRequest(f"{field} does not lead to a picture (png, jpeg, webp, gif, bmp, tiff)") from None
    except Exception as error:
        # A hostile file makes Pillow raise almost anything: struct.error, OverflowError, MemoryError, ...
        logger.debug("%s", field, exc_info=error)
        raise InvalidRequest(f"{field} leads to a picture that is broken ({type(error).__name__})") from None


def _unpacked(data: bytes, check_stop: Callable[[], None] | None, field: str) -> Image.Image:
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    file = _Watched(data, check_stop)
    image = Image.open(file, formats=FORMATS)
    _check_bounds(image)
    file.pixels_follow()
    image.load()
    return _eight_bit(_upright(image, field))


class _Watched(io.BytesIO):
    """A file that Pillow reads piece by piece while it unpacks, and that ends this when it takes too much."""

    def __init__(self, data: bytes, check_stop: Callable[[], None] | None) -> None:
        super().__init__(data)
        self._check_stop = check_stop
        self._deadline = time.monotonic() + TIMEOUT_S
        self._reads_left = MAX_HEADER_READS
        self._bytes_left = MAX_TIFF_HEADER if data[:4] in _TIFF else sys.maxsize

    def pixels_follow(self) -> None:
        """The header has been read: let the rest of the file follow."""
        self._reads_left, self._bytes_left = MAX_READS, sys.maxsize

    def read(self, size: int | None = -1, /) -> bytes:
        if self._check_stop is not None:
            self._check_stop()
        if time.monotonic() > self._deadline:
            raise InvalidRequest(f"leads to a picture that takes more than {TIMEOUT_S:g} s to unpack")
        data = super().read(size)
        self._reads_left -= 1
        self._bytes_left -= len(data)
        if min(self._reads_left, self._bytes_left) < 0:
            raise _too_many_tags()
        return data


def _too_large() -> InvalidRequest:
    return InvalidRequest(f"leads to a picture of more than {MAX_PIXELS} pixels")


def _too_many_tags() -> InvalidRequest:
    return InvalidRequest("leads to a picture with too many tags; send it as png or jpeg without them")


def _check_bounds(image: Image.Image) -> None:
    if max(image.size) > MAX_SIDE:
        raise InvalidRequest(f"leads to a picture with a side of more than {MAX_SIDE} pixels")
    if image.width * image.height > MAX_PIXELS:
        raise _too_large()
    if image.format == "TIFF" and image.info.get("compression") in _JPEG_IN_TIFF:
        raise InvalidRequest("leads to a TIFF that is compressed as JPEG; send it as png or jpeg")


def _check_jpeg(data: bytes) -> None:
    """Count the scans of a JPEG by its markers (ITU-T T.81, annex B), before the first is unpacked."""
    position = scans = segments = 0
    while (marker := _MARKER.search(data, position)) and data[marker.start() + 1] != _EOI:
        kind, position = data[marker.start() + 1], marker.end()
        position += int.from_bytes(data[position : position + 2], "big")
        scans += kind == _SOS
        segments += 1
        if segments > MAX_HEADER_READS:
            raise _too_many_tags()
        if scans > MAX_SCANS:
            raise InvalidRequest(f"leads to a JPEG of more than {MAX_SCANS} scans")


def _upright(image: Image.Image, field: str) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except Exception as error:
        logger.info("%s: broken EXIF (%s) is ignored", field, type(error).__name__)
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow itself clips such values to 255: a 16-bit picture comes out white, a float one black."""
    if image.mode.startswith("I;16"):
        if isinstance(image, TiffImageFile) and (image.tag_v2.get(_BITS), image.tag_v2.get(_PHOTOMETRIC)) != ((16,), 1):
            raise InvalidRequest("leads to a grey TIFF that is not 16 bits from black to white; send it as png")
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        floats = np.asarray(image)
        if not (np.isfinite(floats).all() and floats.min() >= 0 and floats.max() <= 1):
            raise InvalidRequest("leads to a picture of floats that do not all lie in 0 to 1")
        return Image.fromarray(np.round(floats * 255).astype(np.uint8))
    if image.mode == "I":
        raise InvalidRequest("leads to a picture of 32-bit integers; send 8 or 16 bits per channel")
    return image
