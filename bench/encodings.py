"""What encodings of a picture take and give: a part of `bench.overhead`."""

from __future__ import annotations

import io
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image


def png_levels(side: int = 1024, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of PNG, JPEG and WebP encodings of one picture with the spectrum of a photograph."""
    picture = _photograph_like(side)
    encodings: dict[str, tuple[str, dict[str, Any]]] = {
        f"png level {level}": ("PNG", {"compress_level": level}) for level in (0, 1, 2, 3, 4, 6, 9)
    }
    encodings |= {"jpeg quality 90": ("JPEG", {"quality": 90})}
    encodings |= {f"webp quality 90, method {n}": ("WEBP", {"quality": 90, "method": n}) for n in (0, 2, 4)}
    results = {}
    for name, (format_name, options) in encodings.items():
        times, size = [], 0
        for _ in range(repeats):
            buffer = io.BytesIO()
            start = time.perf_counter()
            picture.save(buffer, format_name, **options)
            times.append(1000 * (time.perf_counter() - start))
            size = len(buffer.getvalue())
        results[name] = {"ms": statistics.median(times), "bytes": size}
    return results


def _photograph_like(side: int) -> Image.Image:
    generator = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    shared = generator.standard_normal((side, side))
    channels = []
    for _ in range(3):
        noise = shared + 0.3 * generator.standard_normal((side, side))
        channel = np.fft.ifft2(np.fft.fft2(noise) / frequency**1.5).real
        channels.append(255 * (channel - channel.min()) / np.ptp(channel))
    pixels = np.stack(channels, -1) + generator.normal(0, 1, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
