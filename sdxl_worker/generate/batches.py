"""The pictures of a request in batches that fit the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sdxl_worker.lora.merge import ACTIVATION_RESERVE
from sdxl_worker.memory import free_bytes, free_memory, is_out_of_memory

# Two pictures of 1024 x 1024: what ACTIVATION_RESERVE is known to be enough for.
MAX_BATCH_PIXELS = 2 * 1024 * 1024
BYTES_PER_PIXEL = ACTIVATION_RESERVE // MAX_BATCH_PIXELS

# What one picture of 1024 x 1024 needs beside the weights in float16 (attention, VAE decode), rounded up.
MIN_FREE_BYTES = 4 * 2**30

T = TypeVar("T")


@dataclass
class Steps:
    """The steps of all batches, `of_batch` in each: how many are done, and how many there will be.

    Those of a batch that was given up for lack of memory were made as well: they stay in both, so that neither falls.
    """

    of_batch: int
    done: int = 0
    total: int = 0

    def begin(self, later: int) -> None:
        """A batch begins, and `later` more will follow."""
        self.total = self.done + self.of_batch * (1 + later)


def most_at_once(device: torch.device, pixels: int, reserved: int = 0) -> int:
    """How many pictures of `pixels` to draw at once: as many as the memory is enough for that is free, at least one.

    `reserved` bytes are for something else. On the CPU, whose memory other programs share, two of 1024 x 1024 or as
    much in smaller ones.
    """
    most = MAX_BATCH_PIXELS if device.type != "cuda" else (free_bytes(device) - reserved) // BYTES_PER_PIXEL
    return max(1, most // pixels)


def in_batches(forms: Sequence[Hashable], size: int, draw: Callable[[Sequence[int], int], Sequence[T]]) -> list[T]:
    """What `draw(batch, number of batches still to come)` gives for each picture, in the order of the pictures.

    A batch is indices of at most `size` pictures whose entries in `forms` are equal. When one runs out of memory, it is
    drawn again from the start in batches of half as many, and so are those to come; one picture that does so is the
    caller's to hear of.
    """
    drawn: dict[int, T] = {}
    batches = _batches(range(len(forms)), forms, size)
    while batches:
        batch, *later = batches
        try:
            pictures = draw(batch, len(later))
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            free_memory(error)
            size = (len(batch) + 1) // 2
            batches = _batches([index for index in range(len(forms)) if index not in drawn], forms, size)
        else:
            drawn |= zip(batch, pictures, strict=True)
            batches = later
    return [drawn[index] for index in range(len(forms))]


def _batches(pictures: Sequence[int], forms: Sequence[Hashable], size: int) -> list[list[int]]:
    alike: dict[Hashable, list[int]] = {}
    for picture in pictures:
        alike.setdefault(forms[picture], []).append(picture)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]
