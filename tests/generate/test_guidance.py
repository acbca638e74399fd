"""Guidance that ends early: what a loop written out by hand draws, and in every mode one row a picture afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.errors import Cancelled
from sdxl_worker.generate import batches
from sdxl_worker.generate.guidance import with_guidance_ending
from sdxl_worker.generate.inpaint import made_ready
from sdxl_worker.generate.modes import Pass
from sdxl_worker.generate.refiner import Refiner
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.second_pass import Hires
from tests.support.latents import MASK, START, apart, drawn
from tests.support.pictures import same
from tests.support.plain_sdxl import encoded
from tests.support.vivid import listening, made_vivid

GUIDANCE = 20.0
REQUEST = GenerationRequest(
    "a lighthouse",
    "fog",
    width=64,
    height=64,
    seed=11,
    scheduler="K_EULER",
    num_inference_steps=4,
    guidance_scale=GUIDANCE,
    cfg_end=0.5,
)
# Shares of the largest latent: kernels for other batches round otherwise; pictures without the end differ so much.
SAME, OTHER = 1e-4, 1e-3


@pytest.fixture(scope="module")
def vivid() -> tuple[Any, Refiner]:
    """A tiny SDXL and its refiner, on whose pictures every word and the guidance show."""
    base = topology.build_sdxl()
    refiner = made_vivid(base)
    listening(base.unet)
    return base, refiner


@pytest.fixture
def pipeline(vivid) -> Any:
    """Float32 on the CPU; tests put back what they change."""
    return vivid[0]


@pytest.fixture
def refiner(vivid) -> Refiner:
    """The refiner on `pipeline`."""
    return vivid[1]


@torch.no_grad()
def by_hand(pipeline: Any, scheduler: Any, calls: Sequence[bool], rescale: float = 0.0) -> torch.Tensor:
    """REQUEST's latents; `calls` says for each call of the UNet whether it has guidance."""
    prompt, negative = (encoded(pipeline, [[(text, 1.0)]]) for text in ("a lighthouse", "fog"))
    generator = torch.Generator().manual_seed(11)
    scheduler.set_timesteps(4)
    latents = torch.randn((1, 4, 8, 8), generator=generator) * scheduler.init_noise_sigma
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32)

    def noise_for(text: Any, scaled: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": text.pooled, "time_ids": sizes}
        return pipeline.unet(scaled, time, encoder_hidden_states=text.states, added_cond_kwargs=added).sample

    for time, is_guided in zip(scheduler.timesteps, calls, strict=True):
        scaled = scheduler.scale_model_input(latents, time)
        noise = noise_for(prompt, scaled, time)
        if is_guided:
            with_prompt, without = noise, noise_for(negative, scaled, time)
            noise = without + GUIDANCE * (with_prompt - without)
            noise = rescale * noise * with_prompt.std() / noise.std() + (1 - rescale) * noise
        latents = scheduler.step(noise, time, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("name", "class_name", "share", "calls"),
    [
        ("K_EULER", "EulerDiscreteScheduler", 0.51, "+++-"),
        ("K_EULER", "EulerDiscreteScheduler", 0.0, "----"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler", 0.75, "+++-"),
        ("PNDM", "PNDMScheduler", 0.5, "+++--"),
        ("Heun", "HeunDiscreteScheduler", 0.5, "++++---"),
    ],
)
def test_it_is_what_a_loop_by_hand_draws(name: str, class_name: str, share: float, calls: str, pipeline):
    scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, skip_prk_steps=True)
    expected = by_hand(pipeline, scheduler, [call == "+" for call in calls])
    request = replace(REQUEST, scheduler=name, cfg_end=share)
    assert apart(drawn(pipeline, request), expected) < SAME
    assert apart(drawn(pipeline, replace(request, cfg_end=1.0)), expected) > OTHER


def test_rescaled_guidance_ends_as_well(pipeline):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected = by_hand(pipeline, scheduler, [True, True, False, False], rescale=0.7)
    assert apart(drawn(pipeline, replace(REQUEST, guidance_rescale=0.7)), expected) < SAME


@contextlib.contextmanager
def guided_alike(*unets: Any, calls: str) -> Iterator[None]:
    """From here on the UNets' answers to the negative prompt are those to the prompt, in each call that has a "-".

    a + scale * (a - a) is a: this is guidance that has ended, at twice the work.
    """
    left = iter(calls)

    def alike(_unet: Any, _args: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return output if next(left) == "+" else (torch.cat([output[0].chunk(2)[1]] * 2),)

    hooks = [unet.register_forward_hook(alike) for unet in unets]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not list(left)


@contextlib.contextmanager
def rows_of(*unets: Any) -> Iterator[list[int]]:
    """How many rows each call of the UNets gets."""
    rows: list[int] = []
    hooks = [unet.register_forward_pre_hook(lambda _unet, args: rows.append(len(args[0]))) for unet in unets]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def check(pipeline: Any, request: GenerationRequest, calls: str, *unets: Any, **options: Any) -> None:
    """The request draws as it has to, and gives the UNet no row more than that takes."""
    unets = (pipeline.unet, *unets)
    with rows_of(*unets) as rows:
        found = drawn(pipeline, request, **options)
    assert rows == [request.num_images * (2 if call == "+" else 1) for call in calls]
    with guided_alike(*unets, calls=calls):
        expected = drawn(pipeline, replace(request, cfg_end=1.0), **options)
    assert apart(found, expected) < SAME


# A step of a sampler of order 2 is two calls, and the last one a single call.
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("K_EULER_ANCESTRAL", "+-"),
        ("DPM2 a", "++-"),
        ("DPM++ SDE", "++-"),
        ("UniPC", "+-"),
    ],
)
def test_samplers_that_draw_noise_or_remember_steps(name: str, calls: str, pipeline):
    check(pipeline, replace(REQUEST, scheduler=name, num_inference_steps=2), calls)


def test_two_pictures_with_prompts_of_their_own(pipeline):
    prompts = ("a lighthouse", "a red fox")
    check(pipeline, replace(REQUEST, num_images=2, prompt="", prompts=prompts, guidance_rescale=0.5), "++--")


def test_weighted_prompts_of_several_chunks(pipeline):
    prompt = "a (red:1.4) fox " * 30
    check(pipeline, replace(REQUEST, prompt=prompt, prompt_syntax="a1111", cfg_end=0.75), "+++-")


def test_image_to_image_counts_the_steps_that_it_makes(pipeline):
    request = replace(REQUEST, image_url="https://a/b.png", num_inference_steps=8, strength=0.5)
    check(pipeline, request, "++--", inputs={"image_url": START})


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int, pipeline):
    if channels == 9:
        pipeline = topology.build_sdxl(in_channels=9)
        made_vivid(pipeline)
        listening(pipeline.unet)
    request = replace(
        REQUEST, image_url="https://a/b.png", mask_url="https://a/c.png", strength=1.0, num_images=2, mask_blur=0.0
    )
    check(pipeline, request, "++--", inputs=made_ready(request, {"image_url": START, "mask_url": MASK}))


def test_each_pass_of_hires_has_its_share(pipeline):
    check(pipeline, replace(REQUEST, hires=Hires(1.5, 3, 0.5, "lanczos")), "++--" + "++-")


@pytest.mark.parametrize(("share", "calls"), [(0.25, "++------"), (0.75, "++++++--")])
def test_a_refiner_that_goes_on_is_of_the_same_run(share: float, calls: str, pipeline, refiner):
    request = replace(
        REQUEST,
        num_inference_steps=8,
        cfg_end=share,
        refiner="tiny",
        high_noise_frac=0.5,
        given=frozenset({"high_noise_frac"}),
    )
    check(pipeline, request, calls, refiner.pipeline.unet, refining=refiner.ready_for(request))


def test_a_refiner_that_draws_anew_has_its_own_share(pipeline, refiner):
    request = replace(
        REQUEST,
        refiner="tiny",
        refiner_inference_steps=8,
        strength=0.5,
        given=frozenset({"refiner_inference_steps", "strength"}),
    )
    check(pipeline, request, "++--" + "++--", refiner.pipeline.unet, refining=refiner.ready_for(request))


def test_where_there_is_nothing_to_end_no_bit_changes(pipeline):
    whole = render(pipeline, replace(REQUEST, cfg_end=1.0))[0]
    assert same(render(pipeline, replace(REQUEST, cfg_end=0.9))[0], whole)
    without = render(pipeline, replace(REQUEST, guidance_scale=1.0, cfg_end=1.0))[0]
    assert same(render(pipeline, replace(REQUEST, guidance_scale=1.0))[0], without)
    assert same(render(pipeline, replace(REQUEST, cfg_end=0.0))[0], without)


def test_a_unet_that_is_told_the_scale_has_nothing_to_end():
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=256))
    passes = [Pass(SimpleNamespace(scheduler=SimpleNamespace(order=1), unet=unet), {})]
    assert [with_guidance_ending(passes, [4], share) for share in (0, 0.5)] == [passes] * 2


def test_batches_progress_and_shares_are_as_ever(pipeline, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 64 * 64)
    steps: list[tuple[int, int, torch.Size]] = []
    shares: list[float] = []
    request = replace(REQUEST, num_images=2, scheduler="Heun")
    pictures = render(
        pipeline,
        request,
        on_step=lambda step, total, latents: steps.append((step, total, latents.shape)),
        before_step=shares.append,
    )
    assert steps == [(step, 14, (1, 4, 8, 8)) for step in range(1, 15)]
    assert shares == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75] * 2
    alone = render(pipeline, replace(request, num_images=1, seed=12))[0]
    assert same(pictures[1], alone)


def test_nothing_is_left_behind_by_a_job_that_stops_without_guidance(pipeline):
    before = render(pipeline, replace(REQUEST, cfg_end=1.0))[0]

    def stop(step: int, _total: int, _latents: torch.Tensor) -> None:
        if step == 3:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        render(pipeline, REQUEST, on_step=stop)
    assert same(render(pipeline, replace(REQUEST, cfg_end=1.0))[0], before)
