"""Rendering: the same bits as plain diffusers, nothing left behind, and models loaded from every kind of place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker import topology
from sdxl_worker.errors import Cancelled, GenerationError, ModelUnavailable
from sdxl_worker.generate.load import load_pipeline
from sdxl_worker.generate.render import render, unread_prompt
from sdxl_worker.generate.samplers import SCHEDULERS, make_scheduler, scheduler_names
from sdxl_worker.request import GenerationRequest
from sdxl_worker.settings import Settings
from tests.support.lora_files import save, weight_hash
from tests.support.single_file import save_single_file

REQUEST = GenerationRequest("a lighthouse", "fog", height=64, width=96, seed=11, num_inference_steps=4)


def _same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def _plain(pipeline, request: GenerationRequest, **arguments) -> Image.Image:
    """The picture by diffusers alone, called as its documentation shows."""
    resident = pipeline.scheduler
    pipeline.scheduler = make_scheduler(request.scheduler, resident.config)
    try:
        return pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            **arguments,
        ).images[0]
    finally:
        pipeline.scheduler = resident


@pytest.mark.parametrize("scheduler", scheduler_names())
def test_same_bits_as_plain_diffusers(scheduler: str, pipeline):
    request = replace(REQUEST, scheduler=scheduler)
    assert _same(render(pipeline, request)[0], _plain(pipeline, request))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
def test_same_bits_at_any_guidance(guidance_scale: float, pipeline):
    request = replace(REQUEST, guidance_scale=guidance_scale)
    assert _same(render(pipeline, request)[0], _plain(pipeline, request))


def test_schedulers_are_the_ones_named():
    for name in scheduler_names():
        assert type(make_scheduler(name, topology.SCHEDULER_CONFIG)).__name__ == SCHEDULERS[name]["class"]
    assert make_scheduler("DDIM", topology.SCHEDULER_CONFIG).config.beta_schedule == "scaled_linear"


def test_the_second_picture_has_the_next_seed(pipeline):
    pair = render(pipeline, replace(REQUEST, num_images=2))
    alone = render(pipeline, replace(REQUEST, seed=REQUEST.seed + 1))[0]
    # A batch of two takes other kernels than a batch of one, so the last bit may differ.
    assert np.abs(np.asarray(pair[1], np.int16) - np.asarray(alone, np.int16)).max() <= 1
    assert pair[0].size == (96, 64)


def test_a_prompt_that_is_cut_off_is_named(pipeline):
    # One token per character with the tiny tokenizer, the spaces left out.
    assert unread_prompt(pipeline, replace(REQUEST, prompt="a" * 75)) == []
    long = replace(REQUEST, prompt="a" * 76, negative_prompt="b " * 100)
    assert unread_prompt(pipeline, long) == [
        "prompt has 76 tokens; the model reads the first 75",
        "negative_prompt has 100 tokens; the model reads the first 75",
    ]


def test_the_largest_seed_wraps(pipeline):
    assert len(render(pipeline, replace(REQUEST, seed=2**64 - 1, num_images=2))) == 2


def test_nothing_is_left_behind(pipeline):
    before, scheduler = weight_hash(pipeline), pipeline.scheduler
    for name in scheduler_names():
        render(pipeline, replace(REQUEST, scheduler=name))
    assert pipeline.scheduler is scheduler
    assert weight_hash(pipeline) == before


def test_steps_are_reported_and_change_no_bit(pipeline):
    steps: list[tuple[int, int, tuple[int, ...]]] = []
    pictures = render(
        pipeline, REQUEST, on_step=lambda step, total, latents: steps.append((step, total, latents.shape))
    )
    assert [(step, total) for step, total, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0][2] == (1, 4, 8, 12)
    assert _same(pictures[0], _plain(pipeline, REQUEST))


def test_an_exception_in_a_step_stops_the_run(pipeline):
    before, seen = weight_hash(pipeline), []

    def stop(step: int, _total: int, _latents: torch.Tensor) -> None:
        seen.append(step)
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        render(pipeline, REQUEST, on_step=stop)
    assert seen == [1]
    assert weight_hash(pipeline) == before


def test_image_to_image_follows_the_picture_and_shares_the_weights(pipeline):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    start = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    request = replace(REQUEST, strength=0.5, num_inference_steps=6)
    actual = render(pipeline, request, init_image=start)[0]
    view = StableDiffusionXLImg2ImgPipeline(
        **{**pipeline.components, "scheduler": make_scheduler(request.scheduler, pipeline.scheduler.config)}
    )
    view.set_progress_bar_config(disable=True)
    expected = view(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        image=start,
        strength=0.5,
        num_inference_steps=6,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    assert _same(actual, expected)
    assert not _same(actual, render(pipeline, request)[0])


def test_a_start_picture_of_another_shape_is_cropped_to_the_request(pipeline):
    start = Image.new("RGBA", (50, 200), (10, 200, 30, 128))
    assert render(pipeline, replace(REQUEST, strength=0.5), init_image=start)[0].size == (96, 64)


def test_a_picture_of_nan_is_an_error(pipeline):
    weight = pipeline.vae.decoder.conv_out.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(GenerationError, match="not numbers"):
            render(pipeline, REQUEST)
    finally:
        weight.copy_(kept)


def test_a_vae_left_in_float32_is_put_back(monkeypatch):
    pipeline = topology.build_sdxl(dtype=torch.bfloat16)
    before = weight_hash(pipeline)

    def fails_while_decoding(*_args, **_keywords):
        pipeline.vae.to(torch.float32)
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(type(pipeline), "__call__", fails_while_decoding)
    with pytest.raises(RuntimeError, match="say"):
        render(pipeline, REQUEST)
    assert weight_hash(pipeline) == before


def _settings(tmp_path: Path, model_id: object) -> Settings:
    return Settings.from_environment({"MODEL_ID": str(model_id), "LORA_CACHE_DIR": str(tmp_path / "loras")})


def test_tiny_is_the_same_every_time_and_brings_its_lora(tmp_path: Path):
    first, second = (load_pipeline(_settings(tmp_path, "tiny")) for _ in range(2))
    assert weight_hash(first) == weight_hash(second)
    assert (tmp_path / "loras" / topology.EXAMPLE_LORA).is_file()
    assert not any(parameter.requires_grad for parameter in first.unet.parameters())


def test_a_local_folder_is_served(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(_settings(tmp_path, tmp_path / "model"))
    assert _same(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0])


def test_half_precision_weights_of_a_folder_are_used(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    loaded = load_pipeline(_settings(tmp_path, tmp_path / "model"))
    assert _same(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0])


def test_a_single_file_is_served(pipeline, tmp_path: Path):
    checkpoint = save_single_file(pipeline, tmp_path / "model.safetensors")
    # The configs and tokenizers, without weights.
    pipeline.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*/*.safetensors"):
        weights.unlink()
    loaded = load_pipeline(_settings(tmp_path, checkpoint))
    assert _same(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0])


def test_a_single_file_that_is_no_sdxl_is_one_sentence(tmp_path: Path):
    checkpoint = save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors cannot be loaded"):
        load_pipeline(_settings(tmp_path, checkpoint))


@pytest.mark.parametrize("model_id", ["missing/folder/of/model", "nobody/nothing", "/nowhere/model.safetensors"])
def test_a_missing_model_is_one_sentence(model_id: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sdxl_worker.generate.base_model.RETRY_S", 0.0)
    with pytest.raises(ModelUnavailable, match="MODEL_ID"):
        load_pipeline(_settings(tmp_path, model_id))


def test_a_broken_model_is_one_sentence(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="not a complete SDXL model"):
        load_pipeline(_settings(tmp_path, tmp_path / "model"))


@pytest.mark.gpu
def test_half_precision_on_the_gpu_gives_the_same_bits_twice(tmp_path: Path):
    pipeline = load_pipeline(_settings(tmp_path, "tiny"))
    assert pipeline.device.type == "cuda"
    assert pipeline.unet.dtype == torch.float16
    assert _same(render(pipeline, REQUEST)[0], render(pipeline, REQUEST)[0])
