"""Rendering: the same bits as diffusers called without this worker, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker import topology
from sdxl_worker.errors import Cancelled, GenerationError
from sdxl_worker.generate import batches as batches_module
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from tests.support.lora_files import weight_hash
from tests.support.pictures import by_diffusers, farthest, image_to_image, same

REQUEST = GenerationRequest(
    "a lighthouse", "fog", height=64, width=96, seed=11, num_inference_steps=4, guidance_scale=5.5
)
EULER_A = "EulerAncestralDiscreteScheduler"
# REQUEST as the arguments of a diffusers call that names no negative prompt.
BARE: dict[str, Any] = {
    "prompt": "a lighthouse",
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "guidance_scale": 5.5,
}
START = Image.linear_gradient("L").convert("RGB").resize((96, 64))
FROM_START: dict[str, Any] = {"prompt": "a lighthouse", "image": START, "num_inference_steps": 4, "guidance_scale": 5.5}


@pytest.mark.parametrize(
    ("scheduler", "scheduler_class"),
    [
        ("PNDM", "PNDMScheduler"),
        ("KLMS", "LMSDiscreteScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("K_EULER", "EulerDiscreteScheduler"),
        ("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("DPMSolverSinglestep", "DPMSolverSinglestepScheduler"),
    ],
)
def test_same_bits_as_diffusers(scheduler: str, scheduler_class: str, pipeline):
    (expected,) = by_diffusers(pipeline, scheduler_class, **BARE, negative_prompt="fog")
    assert same(render(pipeline, replace(REQUEST, scheduler=scheduler))[0], expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
def test_same_bits_at_any_guidance(guidance_scale: float, pipeline):
    arguments = {**BARE, "guidance_scale": guidance_scale, "negative_prompt": "fog"}
    (expected,) = by_diffusers(pipeline, EULER_A, **arguments)
    assert same(render(pipeline, replace(REQUEST, guidance_scale=guidance_scale))[0], expected)


def test_without_a_negative_prompt_the_bits_are_those_of_a_call_that_names_none(pipeline):
    (bare,) = by_diffusers(pipeline, EULER_A, **BARE)
    (empty,) = by_diffusers(pipeline, EULER_A, **BARE, negative_prompt="")
    assert not same(bare, empty)
    assert same(render(pipeline, replace(REQUEST, negative_prompt=None))[0], bare)
    assert same(render(pipeline, replace(REQUEST, negative_prompt=""))[0], empty)


def test_image_to_image_without_a_negative_prompt_names_none(pipeline):
    (bare,) = by_diffusers(image_to_image(pipeline), EULER_A, **FROM_START, strength=0.5)
    (empty,) = by_diffusers(image_to_image(pipeline), EULER_A, **FROM_START, strength=0.5, negative_prompt="")
    assert not same(bare, empty)
    request = replace(REQUEST, strength=0.5)
    assert same(render(pipeline, replace(request, negative_prompt=None), inputs={"image_url": START})[0], bare)
    assert same(render(pipeline, replace(request, negative_prompt=""), inputs={"image_url": START})[0], empty)


def test_two_pictures_without_a_negative_prompt_are_those_of_a_bare_call(pipeline):
    expected = by_diffusers(pipeline, EULER_A, seeds=(11, 12), **{**BARE, "prompt": ["a lighthouse"] * 2})
    actual = render(pipeline, replace(REQUEST, negative_prompt=None, num_images=2))
    assert [same(*pair) for pair in zip(actual, expected, strict=True)] == [True, True]


def test_each_picture_has_the_next_seed(pipeline):
    pair = render(pipeline, replace(REQUEST, num_images=2))
    alone = render(pipeline, replace(REQUEST, seed=REQUEST.seed + 1))[0]
    # A batch of two takes other kernels than a batch of one, so the last bit may differ.
    assert farthest(pair[1], alone) <= 1
    assert farthest(pair[0], alone) > 1
    assert pair[0].size == (96, 64)


def test_the_largest_seed_wraps(pipeline):
    assert len(render(pipeline, replace(REQUEST, seed=2**64 - 1, num_images=2))) == 2


# PNDM calls the UNet once more than it has steps, Heun once less than twice.
@pytest.mark.parametrize(
    ("scheduler", "total"), [("K_EULER_ANCESTRAL", 12), ("KLMS", 12), ("PNDM", 15), ("Heun", 21), ("DPM++ SDE", 21)]
)
def test_pictures_of_several_batches_are_those_of_their_seeds(scheduler: str, total: int, pipeline, monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_BATCH_PIXELS", 64 * 96)
    request = replace(REQUEST, scheduler=scheduler, num_images=3)
    steps: list[tuple[int, int]] = []
    pictures = render(pipeline, request, on_step=lambda step, total, _latents: steps.append((step, total)))
    alone = [render(pipeline, replace(request, seed=seed, num_images=1))[0] for seed in (11, 12, 13)]
    assert [same(*pair) for pair in zip(pictures, alone, strict=True)] == [True] * 3
    assert steps == [(step, total) for step in range(1, total + 1)]


def test_nothing_is_left_behind(pipeline):
    before, scheduler = weight_hash(pipeline), pipeline.scheduler
    for name in ("PNDM", "KLMS", "DPMSolverMultistep"):
        render(pipeline, replace(REQUEST, scheduler=name))
    assert pipeline.scheduler is scheduler
    assert weight_hash(pipeline) == before


def test_steps_are_reported_and_change_no_bit(pipeline):
    steps: list[tuple[int, int, tuple[int, ...]]] = []
    pictures = render(
        pipeline, REQUEST, on_step=lambda step, total, latents: steps.append((step, total, latents.shape))
    )
    assert steps == [(step, 4, (1, 4, 8, 12)) for step in (1, 2, 3, 4)]
    assert same(pictures[0], render(pipeline, REQUEST)[0])


def test_the_share_that_is_done_is_said_before_each_step(pipeline, monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_BATCH_PIXELS", 64 * 96)
    done: list[float] = []
    pictures = render(pipeline, replace(REQUEST, num_images=2), before_step=done.append)
    assert done == [0, 0.25, 0.5, 0.75] * 2
    assert same(pictures[0], render(pipeline, REQUEST)[0])


def test_an_exception_in_a_step_stops_the_run(pipeline):
    before, seen = weight_hash(pipeline), []

    def stop(step: int, _total: int, _latents: torch.Tensor) -> None:
        seen.append(step)
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        render(pipeline, REQUEST, on_step=stop)
    assert seen == [1]
    assert weight_hash(pipeline) == before


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 2), (1.0, 4)])
def test_image_to_image_follows_the_picture(strength: float, steps: int, pipeline):
    (expected,) = by_diffusers(
        image_to_image(pipeline), EULER_A, **FROM_START, strength=strength, negative_prompt="fog"
    )
    seen: list[tuple[int, int]] = []
    request = replace(REQUEST, strength=strength)
    (actual,) = render(
        pipeline, request, inputs={"image_url": START}, on_step=lambda step, total, _latents: seen.append((step, total))
    )
    assert same(actual, expected)
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    assert not same(actual, render(pipeline, request)[0])


def _no_step(step: int, _total: int, _latents: torch.Tensor) -> None:
    raise AssertionError(f"step {step} of nothing to denoise")


def test_strength_0_gives_the_fitted_picture_back(pipeline):
    start = Image.linear_gradient("L").resize((192, 200))
    pictures = render(
        pipeline, replace(REQUEST, strength=0.0, num_images=2), inputs={"image_url": start}, on_step=_no_step
    )
    # Two thirds as wide as high: as much is cut off above as below.
    middle = start.convert("RGB").crop((0, 36, 192, 164)).resize((96, 64), Image.Resampling.LANCZOS)
    assert [farthest(picture, middle) <= 1 for picture in pictures] == [True, True]
    assert pictures[0] is not pictures[1]


def test_a_start_picture_of_another_shape_is_cropped_to_the_request(pipeline):
    start = Image.new("RGBA", (50, 200), (10, 200, 30, 128))
    assert render(pipeline, replace(REQUEST, strength=0.5), inputs={"image_url": start})[0].size == (96, 64)


def test_a_picture_of_nan_is_an_error(pipeline):
    weight = pipeline.vae.decoder.conv_out.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(GenerationError, match="not numbers"):
            render(pipeline, REQUEST)
    finally:
        weight.copy_(kept)


@pytest.mark.parametrize("cast", ["encoder", "decoder", ""])
def test_a_vae_left_in_float32_is_put_back(cast: str, monkeypatch):
    """All of it or a part, which is what memory that runs out while it is cast leaves."""
    pipeline = topology.build_sdxl(dtype=torch.bfloat16)
    before = weight_hash(pipeline)

    def fails_while_decoding(*_args, **_keywords):
        pipeline.vae.get_submodule(cast).to(torch.float32)
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(type(pipeline), "__call__", fails_while_decoding)
    with pytest.raises(RuntimeError, match="say"):
        render(pipeline, REQUEST)
    assert weight_hash(pipeline) == before
