"""Previews are made from latents, beside the run."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.generate.previews import Previews
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from tests.support.pictures import same

REQUEST = GenerationRequest("a lighthouse", width=64, height=64, seed=5, num_inference_steps=3)
ON_CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


@ON_CPU_AND_CUDA
def test_a_small_jpeg_of_the_first_picture(device: str):
    latents = torch.zeros(2, 4, 8, 16, device=device)
    latents[0, 0, :, :8] = 1.0
    image = opened(Previews().begin(latents)())
    assert (image.format, image.size) == ("JPEG", (16, 8))
    # The formula of the page that the numbers are from: 150 140 130, and 60 more of each where the first channel is 1.
    left, right = np.asarray(image)[4, 2].astype(int), np.asarray(image)[4, 13].astype(int)
    assert np.abs(left - [210, 200, 190]).max() <= 4
    assert np.abs(right - [150, 140, 130]).max() <= 4
    Previews().begin(torch.full((1, 4, 2, 2), torch.nan, device=device))()


@ON_CPU_AND_CUDA
def test_it_shows_the_latents_of_the_moment_it_began(device: str):
    latents = torch.zeros(1, 4, 8, 8, device=device)
    finish = Previews().begin(latents)
    latents += 100.0
    assert np.abs(np.asarray(opened(finish())).astype(int) - [150, 140, 130]).max() <= 4


@pytest.mark.gpu
def test_the_run_does_not_wait_for_it_to_begin():
    latents = torch.zeros(1, 4, 128, 128, device="cuda", dtype=torch.float16)
    Previews().begin(latents)()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish = Previews().begin(latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opened(finish()).size == (128, 128)


def test_the_picture_has_the_same_bits_with_previews(pipeline: Any):
    made: list[str] = []
    threads: list[threading.Thread] = []

    def on_step(_step: int, _steps: int, latents: torch.Tensor) -> None:
        finish = Previews().begin(latents)
        threads.append(threading.Thread(target=lambda: made.append(finish())))
        threads[-1].start()

    (watched,) = render(pipeline, REQUEST, on_step=on_step)
    for thread in threads:
        thread.join(60)
    assert len(made) == 3
    assert same(watched, render(pipeline, REQUEST)[0])
