"""The second pass of `hires` against diffusers' pipelines called one after the other by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sdxl_worker.errors import Cancelled, GenerationError
from sdxl_worker.generate import batches as batches_module
from sdxl_worker.generate import render as render_module
from sdxl_worker.generate import tiled_vae, vae
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest, LoraScale
from sdxl_worker.request.second_pass import Hires
from sdxl_worker.topology import write_example_lora
from tests.support.lora_files import weight_hash
from tests.support.pictures import farthest, image_to_image, same

REQUEST = GenerationRequest(
    "a lighthouse", "fog", height=64, width=96, seed=11, num_inference_steps=4, hires=Hires(1.5, 3, 0.5, "latent")
)
# The same as the arguments of diffusers' pipelines.
PROMPTS: dict[str, Any] = {"prompt": "a lighthouse", "negative_prompt": "fog", "guidance_scale": 5.5}
FIRST: dict[str, Any] = {**PROMPTS, "height": 64, "width": 96, "num_inference_steps": 4}
# Three steps at half the noise are the last of six.
SECOND: dict[str, Any] = {**PROMPTS, "num_inference_steps": 6, "strength": 0.5}
EULER_A = "EulerAncestralDiscreteScheduler"


def seeded(seed: int = 11) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


def latent_by_hand(pipeline: Any, scheduler: str = EULER_A, **changed: Any) -> Image.Image:
    resident = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(resident.config)
    try:
        latents = pipeline(**{**FIRST, **changed}, output_type="latent", generator=seeded()).images
        larger = torch.nn.functional.interpolate(latents, size=(12, 18), mode="bilinear", align_corners=False)
        return image_to_image(pipeline)(image=larger, **{**SECOND, **changed}, generator=seeded()).images[0]
    finally:
        pipeline.scheduler = resident


@pytest.mark.parametrize(
    ("scheduler", "class_name"),
    [
        ("K_EULER_ANCESTRAL", EULER_A),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("PNDM", "PNDMScheduler"),
    ],
)
def test_latent_is_what_diffusers_gives_when_its_pipelines_are_called_by_hand(scheduler, class_name, pipeline):
    changed = {"num_inference_steps": 6}
    (picture,) = render(pipeline, replace(REQUEST, scheduler=scheduler, num_inference_steps=6))
    assert picture.size == (144, 96)
    assert farthest(picture, latent_by_hand(pipeline, class_name, **changed)) <= 1


def test_lanczos_is_what_diffusers_gives_when_its_pipelines_are_called_by_hand(pipeline):
    (picture,) = render(pipeline, replace(REQUEST, hires=Hires(1.5, 3, 0.5, "lanczos")))
    resident = pipeline.scheduler
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(resident.config)
    try:
        (small,) = pipeline(**FIRST, generator=seeded()).images
        larger = small.resize((144, 96), Image.Resampling.LANCZOS)
        (expected,) = image_to_image(pipeline)(image=larger, **SECOND, generator=seeded()).images
    finally:
        pipeline.scheduler = resident
    assert farthest(picture, expected) <= 1
    assert farthest(picture, larger) > 20


def test_steps_left_out_are_those_of_the_first_pass(pipeline):
    request = replace(REQUEST, hires=Hires(1.5, None, 0.5))
    seen = steps_of(pipeline, request)
    assert seen == [(step, 8) for step in range(1, 9)]
    assert same(render(pipeline, request)[0], render(pipeline, replace(request, hires=Hires(1.5, 4, 0.5)))[0])


def steps_of(pipeline: Any, request: GenerationRequest, **more: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    render(pipeline, request, on_step=lambda step, total, _latents: seen.append((step, total)), **more)
    return seen


# PNDM makes one call more for each pass: it repeats its second timestep.
def test_progress_counts_both_passes_of_all_batches(pipeline, monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_BATCH_PIXELS", 144 * 96)
    assert steps_of(pipeline, replace(REQUEST, num_images=2)) == [(step, 14) for step in range(1, 15)]


def test_each_picture_is_that_of_its_seed_alone(pipeline):
    for upscaler in ("latent", "lanczos"):
        request = replace(REQUEST, hires=Hires(1.5, 2, 0.5, upscaler))
        _, second = render(pipeline, replace(request, num_images=2))
        assert farthest(second, render(pipeline, replace(request, seed=12))[0]) <= 1


def test_batches_have_room_for_the_second_pass(pipeline, monkeypatch):
    sizes: list[int] = []

    def most(_device: torch.device, pixels: int, _reserved: int) -> int:
        sizes.append(pixels)
        return 1

    monkeypatch.setattr(render_module, "most_at_once", most)
    render(pipeline, REQUEST)
    render(pipeline, replace(REQUEST, hires=None))
    assert sizes == [144 * 96, 96 * 64]


def test_image_to_image_goes_before_it(pipeline):
    start = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    (picture,) = render(pipeline, replace(REQUEST, strength=0.5), inputs={"image_url": start})
    resident = pipeline.scheduler
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(resident.config)
    try:
        first = {**PROMPTS, "num_inference_steps": 4, "strength": 0.5, "image": start, "output_type": "latent"}
        latents = image_to_image(pipeline)(**first, generator=seeded()).images
        larger = torch.nn.functional.interpolate(latents, size=(12, 18), mode="bilinear", align_corners=False)
        (expected,) = image_to_image(pipeline)(image=larger, **SECOND, generator=seeded()).images
    finally:
        pipeline.scheduler = resident
    assert farthest(picture, expected) <= 1


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_in_tiles_it_is_the_same_picture(upscaler: str, pipeline, monkeypatch):
    request = replace(REQUEST, hires=Hires(1.5, 3, 0.5, upscaler))
    (whole,) = render(pipeline, request)
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 96 * 64)
    monkeypatch.setattr(tiled_vae, "TILE", 24)
    tiles = count_tiles(monkeypatch)
    (tiled,) = render(pipeline, request)
    assert farthest(tiled, whole) <= 1
    assert max(tiles) > 1
    tiles.clear()
    render(pipeline, replace(request, hires=None))
    assert tiles == []


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    stock = tiled_vae._tiles

    def counted(height: int, width: int) -> list:
        tiles = stock(height, width)
        counts.append(len(tiles))
        return tiles

    monkeypatch.setattr(tiled_vae, "_tiles", counted)
    return counts


def test_a_weighted_prompt_and_a_lora_reach_both_passes(pipeline, engine, tmp_path):
    plain = render(pipeline, REQUEST)[0]
    before = weight_hash(pipeline)
    lora = engine.read(write_example_lora(tmp_path))
    with engine.applied([(lora, LoraScale.uniform(1.0))]):
        (drawn,) = render(pipeline, REQUEST)
        assert farthest(drawn, latent_by_hand(pipeline)) <= 1
    assert weight_hash(pipeline) == before
    assert farthest(drawn, plain) > 1
    weighted = replace(REQUEST, prompt="a (lighthouse:1.5)", prompt_syntax="a1111")
    assert not same(render(pipeline, weighted)[0], plain)
    assert same(render(pipeline, REQUEST)[0], plain)


@pytest.mark.parametrize("at", [2, 6])
def test_cancelled_in_either_pass_it_leaves_nothing_behind(at: int, pipeline):
    before, scheduler, plain = weight_hash(pipeline), pipeline.scheduler, render(pipeline, REQUEST)[0]

    def stop(step: int, _total: int, _latents: torch.Tensor) -> None:
        if step == at:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        render(pipeline, REQUEST, on_step=stop)
    assert weight_hash(pipeline) == before
    assert pipeline.scheduler is scheduler
    assert "forward" not in vars(pipeline.vae.decoder)
    assert same(render(pipeline, REQUEST)[0], plain)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_first_pass_of_nan_is_an_error(upscaler: str, pipeline):
    """As whole numbers its pixels would be black, and the second pass would draw something from them."""

    def spoil(_unet: Any, inputs: Any, outputs: Any) -> Any:
        return tuple(output * float("nan") for output in outputs) if inputs[0].shape[-1] == 12 else None

    hook = pipeline.unet.register_forward_hook(spoil)
    try:
        with pytest.raises(GenerationError, match="not numbers"):
            render(pipeline, replace(REQUEST, hires=Hires(1.5, 3, 0.5, upscaler)))
    finally:
        hook.remove()


def test_the_second_pass_runs_on_the_resident_weights(pipeline):
    from sdxl_worker.generate.hires import with_second_pass
    from sdxl_worker.generate.modes import mode_for

    _, second = with_second_pass(pipeline, REQUEST, mode_for({}).passes(pipeline, REQUEST))
    assert all(second.view.components[name] is part for name, part in pipeline.components.items())
