"""DeepCache: what the UNet's blocks give when they are called by hand, which of them run, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sdxl_worker.errors import Cancelled
from sdxl_worker.generate import batches
from sdxl_worker.generate.deep_cache import deep_blocks
from sdxl_worker.generate.inpaint import made_ready
from sdxl_worker.generate.refiner import load_refiner
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.second_pass import Hires
from sdxl_worker.settings import Settings
from tests.support.latents import MASK, START, apart, drawn
from tests.support.lora_files import weight_hash
from tests.support.pictures import farthest, same
from tests.support.plain_sdxl import Text, encoded

REQUEST = GenerationRequest(
    "a lighthouse",
    "fog",
    width=64,
    height=64,
    seed=11,
    scheduler="K_EULER",
    num_inference_steps=6,
    guidance_scale=5.5,
    deep_cache=2,
)
# Shares of the largest latent: kernels for other batches round otherwise; other calculations differ so much.
SAME, OTHER = 1e-5, 1e-3


def unet_by_hand(
    unet: Any, sample: torch.Tensor, time: torch.Tensor, text: Text, deep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise that a UNet of three levels finds, and what its last deep block gave; `deep` is given in its place."""
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32)
    states, added = text.states, {"text_embeds": text.pooled, "time_ids": sizes}
    emb = unet.time_embedding(unet.time_proj(time.expand(1)))
    emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added)
    x0 = unet.conv_in(sample)
    outer, (x1, x2, x3) = unet.down_blocks[0](hidden_states=x0, temb=emb)
    if deep is None:
        inner, (x4, x5, x6) = unet.down_blocks[1](hidden_states=outer, temb=emb, encoder_hidden_states=states)
        inner, (x7, x8) = unet.down_blocks[2](hidden_states=inner, temb=emb, encoder_hidden_states=states)
        inner = unet.mid_block(inner, emb, encoder_hidden_states=states)
        for block, kept in zip(unet.up_blocks, ((x6, x7, x8), (x3, x4, x5)), strict=False):
            inner = block(hidden_states=inner, temb=emb, res_hidden_states_tuple=kept, encoder_hidden_states=states)
        deep = inner
    last = unet.up_blocks[2](hidden_states=deep, temb=emb, res_hidden_states_tuple=(x0, x1, x2))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(last))), deep


@torch.no_grad()
def by_hand(pipeline: Any, scheduler: Any, calls: str) -> torch.Tensor:
    """REQUEST's latents; "+" is a whole call, "-" one over what the last whole one left; "p", "m": without guidance."""
    texts = [encoded(pipeline, [[(words, 1.0)]]) for words in ("a lighthouse", "fog")]
    scheduler.set_timesteps(6)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11)) * scheduler.init_noise_sigma
    deep: list[torch.Tensor | None] = [None, None]
    for time, call in zip(scheduler.timesteps, calls, strict=True):
        scaled = scheduler.scale_model_input(latents, time)
        noises = []
        for index, text in enumerate(texts if call in "+-" else texts[:1]):
            noise, deep[index] = unet_by_hand(pipeline.unet, scaled, time, text, None if call in "+p" else deep[index])
            noises.append(noise)
        noise = noises[0] if len(noises) == 1 else noises[1] + 5.5 * (noises[0] - noises[1])
        latents = scheduler.step(noise, time, latents).prev_sample
    return latents


@contextlib.contextmanager
def calls_of(*unets: Any) -> Iterator[list[str]]:
    """For each call of the UNets "+" where all blocks ran, "-" where the first and the last alone did."""
    ran: list[set[str]] = []
    hooks = []
    for unet in unets:
        hooks.append(unet.register_forward_pre_hook(lambda _unet, _args: ran.append(set())))
        for name, block in (*_named(unet), ("mid", unet.mid_block)):
            hooks.append(block.resnets[0].register_forward_pre_hook(lambda _block, _args, name=name: ran[-1].add(name)))
    signs: list[str] = []
    try:
        yield signs
    finally:
        for hook in hooks:
            hook.remove()
    for names in ran:
        levels = max(int(name[-1]) for name in names if name[-1].isdigit()) + 1
        whole = {f"{side}{level}" for side in ("down", "up") for level in range(levels)} | {"mid"}
        assert names in (whole, {"down0", f"up{levels - 1}"})
        signs.append("+" if names == whole else "-")


def _named(unet: Any) -> Iterator[tuple[str, Any]]:
    for side, blocks in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        yield from ((f"{side}{level}", block) for level, block in enumerate(blocks))


def check(pipeline: Any, request: GenerationRequest, calls: str, *unets: Any, **options: Any) -> list[Image.Image]:
    """The request's pictures, drawn in these calls."""
    with calls_of(pipeline.unet, *unets) as seen:
        pictures = render(pipeline, request, **options)
    assert "".join(seen) == calls
    return pictures


@pytest.mark.parametrize(
    ("name", "class_name", "changed", "calls"),
    [
        ("K_EULER", "EulerDiscreteScheduler", {"deep_cache": 2}, "+-+-++"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler", {"deep_cache": 3}, "+--+-+"),
        # Both calls of a step are alike.
        ("Heun", "HeunDiscreteScheduler", {"deep_cache": 2}, "++--++--+++"),
        # Without guidance there is nothing of the right shape yet.
        ("K_EULER", "EulerDiscreteScheduler", {"deep_cache": 3, "cfg_end": 0.3}, "+-ppmp"),
    ],
)
def test_it_is_what_the_blocks_give_by_hand(name: str, class_name: str, changed: dict, calls: str, pipeline):
    scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config)
    request = replace(REQUEST, scheduler=name, **changed)
    expected = by_hand(pipeline, scheduler, calls)
    assert apart(drawn(pipeline, request), expected) < SAME
    assert apart(drawn(pipeline, replace(request, deep_cache=1)), expected) > OTHER


def test_each_picture_of_a_request_is_the_one_drawn_alone(pipeline, monkeypatch):
    request = replace(REQUEST, num_images=2, prompt="", prompts=("a lighthouse", "a red fox"))
    alone = render(pipeline, replace(REQUEST, prompt="a red fox", seed=12))[0]
    for pixels, calls in ((2 * 64 * 64, "+-+-++"), (64 * 64, "+-+-++" * 2)):
        monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", pixels)
        assert farthest(check(pipeline, request, calls)[1], alone) <= 1


def test_image_to_image_counts_the_steps_that_it_makes(pipeline):
    request = replace(REQUEST, image_url="https://a/b.png", num_inference_steps=8, strength=0.5)
    check(pipeline, request, "+-++", inputs={"image_url": START})


def test_inpainting(pipeline):
    request = replace(
        REQUEST, image_url="https://a/b.png", mask_url="https://a/c.png", strength=1.0, cfg_end=0.5, deep_cache=3
    )
    inputs = made_ready(request, {"image_url": START, "mask_url": MASK})
    check(pipeline, request, "+--+-+", inputs=inputs)


def test_each_pass_of_hires_begins_anew(pipeline):
    check(pipeline, replace(REQUEST, hires=Hires(1.5, 4, 0.5, "latent")), "+-+-++" + "+-++")


def test_the_refiner_has_its_own(pipeline):
    refiner = load_refiner(Settings(refiner_id="tiny"), pipeline)
    assert refiner is not None
    request = replace(REQUEST, num_inference_steps=8, refiner="tiny", high_noise_frac=0.5, given=frozenset())
    unet = refiner.pipeline.unet
    check(pipeline, request, "+-++" + "+-++", unet, refining=refiner.ready_for(request))
    assert [block for block in deep_blocks(unet) if "forward" in vars(block)] == []


@pytest.mark.parametrize(("name", "calls"), [("K_EULER", "+--+++"), ("Heun", "++----+++++")])
def test_weights_that_change_between_two_steps_are_gone_through_anew(name: str, calls: str, pipeline):
    """Before the fourth one, and of its two calls the first."""
    shares: list[float] = []

    def before_step(done: float) -> bool:
        shares.append(done)
        return done == 0.5 and shares.count(0.5) == 1

    with calls_of(pipeline.unet) as seen:
        render(pipeline, replace(REQUEST, scheduler=name, deep_cache=4), before_step=before_step)
    assert "".join(seen) == calls


def test_progress_and_previews_are_as_ever(pipeline):
    steps: list[tuple[int, int, torch.Size]] = []
    render(pipeline, REQUEST, on_step=lambda step, total, latents: steps.append((step, total, latents.shape)))
    assert steps == [(step, 6, (1, 4, 8, 8)) for step in range(1, 7)]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_is_left_behind(is_stopped: bool, pipeline, monkeypatch):
    plain = replace(REQUEST, deep_cache=1)
    before, weights, blocks = render(pipeline, plain)[0], weight_hash(pipeline), deep_blocks(pipeline.unet)
    outputs: list[weakref.ref] = []
    hook = pipeline.unet.mid_block.register_forward_hook(
        lambda _block, _args, output: outputs.append(weakref.ref(output))
    )
    other = blocks[1].forward
    monkeypatch.setitem(vars(blocks[1]), "forward", other)

    def on_step(step: int, _total: int, _latents: torch.Tensor) -> None:
        assert all("forward" in vars(block) for block in blocks)
        if step == 2 and is_stopped:
            raise Cancelled("stopped")

    try:
        # Whoever looks at the error holds on to the frames that it came through.
        with pytest.raises(Cancelled) if is_stopped else contextlib.nullcontext() as caught:
            render(pipeline, REQUEST, on_step=on_step)
    finally:
        hook.remove()
    gc.collect()
    assert outputs
    assert is_stopped == (caught is not None)
    assert [output for output in outputs if output() is not None] == []
    assert [block for block in blocks if "forward" in vars(block)] == [blocks[1]]
    assert blocks[1].forward is other
    assert weight_hash(pipeline) == weights
    assert same(render(pipeline, plain)[0], before)
