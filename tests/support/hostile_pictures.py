"""Small files that are pictures, and take far more to unpack than their size."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def saved(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """`image` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def tall_png(height: int = 67_108_864) -> bytes:
    """A black and white PNG of one pixel's width: 130 KB."""
    pack = zlib.compressobj(9)
    rows = [pack.compress(bytes(2**20)) for _ in range(2 * height >> 20)]
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, height, 1, 0, 0, 0, 0)), (b"IDAT", b"".join(rows) + pack.flush()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_png_chunk, *zip(*chunks, (b"IEND", b""), strict=True)))


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def many_chunks_png(chunks: int) -> bytes:
    """A PNG of one pixel behind that many empty private chunks."""
    whole = saved(Image.new("L", (1, 1)), "PNG")
    return whole[:33] + chunks * _png_chunk(b"prVt", b"") + whole[33:]


def repeated_scans_jpeg(side: int = 5000, size: int = 301_000) -> bytes:
    """A flat progressive JPEG of that size whose last scan comes again and again."""
    whole = saved(Image.new("RGB", (side, side), (120, 60, 30)), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + (size - len(whole)) // len(scan) * scan + b"\xff\xd9"


def many_strips_tiff(strips: int) -> bytes:
    """A TIFF of two pixels whose list of strips has that many entries."""
    tags = (
        *((256, 4, 1, 1), (257, 4, 1, 2), (258, 3, 1, 8 << 16), (259, 3, 1, 1 << 16), (262, 3, 1, 1 << 16)),
        *((273, 4, strips, 122), (277, 3, 1, 1 << 16), (278, 4, 1, 1), (279, 4, strips, 122)),
    )
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    return (b"MM\0*" + struct.pack(">I", 8) + directory).ljust(122, b"\0") + struct.pack(">I", 1) * strips
