"""Batches that fit the memory, and what happens when one did not."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from sdxl_worker.errors import Cancelled
from sdxl_worker.generate import batches
from sdxl_worker.generate.batches import in_batches, most_at_once
from sdxl_worker.generate.render import render
from sdxl_worker.memory import free_bytes
from sdxl_worker.request import GenerationRequest
from tests.support.lora_files import weight_hash
from tests.support.pictures import farthest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REQUEST = GenerationRequest(
    "a lighthouse", height=64, width=96, seed=11, num_inference_steps=3, guidance_scale=5.5, num_images=8
)


@pytest.mark.parametrize(
    ("width", "height", "most"),
    [(1024, 1024, 2), (512, 512, 8), (1152, 896, 2), (1216, 1216, 1), (2048, 2048, 1)],
)
def test_on_the_cpu_no_more_than_two_pictures_of_1024(width: int, height: int, most: int) -> None:
    assert most_at_once(CPU, width * height) == most


@pytest.mark.parametrize(
    ("free_gb", "side", "most"), [(70, 1024, 23), (9, 1024, 3), (5.9, 1024, 1), (5.9, 512, 7), (0.5, 1024, 1)]
)
def test_on_a_gpu_as_many_as_the_free_memory_is_enough_for(free_gb: float, side: int, most: int, monkeypatch) -> None:
    """3 GiB for each picture of 1024 x 1024, and a quarter of it at 512 x 512."""
    monkeypatch.setattr(batches, "free_bytes", lambda _: int(free_gb * 2**30))
    assert most_at_once(CUDA, side * side) == most


def test_what_torch_keeps_for_the_next_one_is_free(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 400)
    assert free_bytes(CUDA) == 1300


def test_only_pictures_of_one_form_are_drawn_together_and_come_back_in_order() -> None:
    drawn: list[tuple[list[int], int]] = []

    def draw(batch, later: int) -> list[str]:
        drawn.append((list(batch), later))
        return [f"picture {index}" for index in batch]

    assert in_batches(["a", "b", "a", "a", "b"], 2, draw) == [f"picture {index}" for index in range(5)]
    assert drawn == [([0, 2], 2), ([3], 1), ([1, 4], 0)]


@pytest.mark.parametrize(
    ("fits", "tried"), [(8, [8]), (5, [8, 4, 4]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2, *[1] * 8]), (0, [8, 4, 2, 1])]
)
def test_a_batch_that_does_not_fit_is_drawn_again_in_halves(fits: int, tried: list[int]) -> None:
    sizes: list[int] = []

    def draw(batch, _later: int) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    if fits:
        assert in_batches([0] * 8, 8, draw) == list(range(8))
    else:
        with pytest.raises(torch.OutOfMemoryError):
            in_batches([0] * 8, 8, draw)
    assert sizes == tried


def test_what_was_drawn_before_is_kept() -> None:
    sizes: list[int] = []

    def draw(batch, _later: int) -> list[int]:
        sizes.append(len(batch))
        if sizes == [4, 4]:
            raise torch.OutOfMemoryError
        return list(batch)

    assert in_batches([0] * 8, 4, draw) == list(range(8))
    assert sizes == [4, 4, 2, 2]


def test_what_the_failed_batch_held_is_let_go_of_before_the_next_one() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def draw(batch, _later: int) -> list[int]:
        assert not any(reference() is not None for reference in held)
        tensor = torch.zeros(1000)
        held.append(weakref.ref(tensor))
        # Known to the frame that it comes from, as library code has it: a cycle, which holds the frame.
        error = torch.OutOfMemoryError("CUDA out of memory")
        if len(batch) > 1:
            raise error
        return list(batch)

    assert in_batches([0] * 4, 4, draw) == list(range(4))


@pytest.mark.parametrize("error", [Cancelled("stopped"), RuntimeError("CUDA error: an illegal memory access")])
def test_other_failures_are_not_tried_again(error: Exception) -> None:
    sizes: list[int] = []

    def draw(batch, _later: int) -> list[int]:
        sizes.append(len(batch))
        raise error

    with pytest.raises(type(error)):
        in_batches([0] * 4, 4, draw)
    assert sizes == [4]


def _runs_out(module: Any, monkeypatch, *, above: int, at_call: int) -> list[int]:
    """Let the module's `forward` run out of memory above that many samples, from that call on; the sizes it saw."""
    original, seen = module.forward, []

    def forward(sample: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        seen.append(len(sample))
        if len(sample) > above and len(seen) >= at_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(sample, *arguments, **keywords)

    monkeypatch.setattr(module, "forward", forward)
    return seen


# With guidance the UNet sees every picture twice.
@pytest.mark.parametrize(
    ("module", "above", "at_call", "steps"),
    [
        ("unet", 8, 1, [(step, 6) for step in range(1, 7)]),
        ("unet", 8, 3, [(1, 3), (2, 3), *((step, 8) for step in range(3, 9))]),
        ("unet", 2, 2, [(1, 3), *((step, 25) for step in range(2, 26))]),
        ("decoder", 4, 1, [*((step, 3) for step in range(1, 4)), *((step, 9) for step in range(4, 10))]),
    ],
    ids=["before denoising", "while denoising", "down to one", "while decoding"],
)
def test_pictures_and_progress_where_memory_runs_out(module, above, at_call, steps, pipeline, monkeypatch) -> None:
    before = weight_hash(pipeline)
    alone = [render(pipeline, replace(REQUEST, seed=seed, num_images=1))[0] for seed in range(11, 19)]
    runs_out_in = pipeline.unet if module == "unet" else pipeline.vae.decoder
    seen: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        _runs_out(runs_out_in, patch, above=above, at_call=at_call)
        pictures = render(pipeline, REQUEST, on_step=lambda step, total, _latents: seen.append((step, total)))
    assert [farthest(*pair) <= 1 for pair in zip(pictures, alone, strict=True)] == [True] * 8
    assert seen == steps
    assert weight_hash(pipeline) == before


def test_one_picture_that_does_not_fit_is_the_caller_s_to_hear_of(pipeline, monkeypatch) -> None:
    seen = _runs_out(pipeline.unet, monkeypatch, above=0, at_call=1)
    with pytest.raises(torch.OutOfMemoryError):
        render(pipeline, REQUEST)
    assert seen == [16, 8, 4, 2]


def test_a_batch_of_more_pixels_than_two_pictures_of_1024_is_decoded_one_by_one(pipeline, monkeypatch) -> None:
    together = render(pipeline, replace(REQUEST, num_images=3))
    monkeypatch.setattr("sdxl_worker.generate.render.MAX_BATCH_PIXELS", 2 * 64 * 96)
    decoded = _runs_out(pipeline.vae.decoder, monkeypatch, above=99, at_call=1)
    pictures = render(pipeline, replace(REQUEST, num_images=3))
    assert decoded == [1, 1, 1]
    assert [farthest(*pair) <= 1 for pair in zip(pictures, together, strict=True)] == [True] * 3
    assert not pipeline.vae.use_slicing
    render(pipeline, replace(REQUEST, num_images=2))
    assert decoded[3:] == [2]


def test_a_seed_may_come_twice(pipeline) -> None:
    pictures = render(pipeline, replace(REQUEST, num_images=3, seeds=(4, 11, 4)))
    alone = {seed: render(pipeline, replace(REQUEST, num_images=1, seed=seed))[0] for seed in (4, 11)}
    assert [farthest(*pair) <= 1 for pair in zip(pictures, [alone[4], alone[11], alone[4]], strict=True)] == [True] * 3
    assert farthest(pictures[0], pictures[1]) > 1
