"""Inpainting: under the mask what stock diffusers draws, beside it the picture's own pixels, bit for bit."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sdxl_worker import topology
from sdxl_worker.errors import Cancelled, InvalidRequest
from sdxl_worker.generate import inpaint
from sdxl_worker.generate.inpaint import Box, crop_box, made_ready
from sdxl_worker.generate.load import load_pipeline
from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import Extend, GenerationRequest, LoraScale
from sdxl_worker.schedulers import SCHEDULERS
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from sdxl_worker.worker import Worker
from tests.support.lora_files import weight_hash
from tests.support.pictures import by_diffusers, farthest, inpainting, same
from tests.support.plain_sdxl import encoded
from tests.support.single_file import save_configs, save_single_file

REQUEST = GenerationRequest(
    "a lighthouse",
    "fog",
    height=64,
    width=64,
    seed=11,
    num_inference_steps=4,
    image_url="https://a/b.png",
    mask_url="https://a/c.png",
    mask_blur=0.0,
)
CALL: dict[str, Any] = {
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "guidance_scale": 5.5,
}
EULER_A = "EulerAncestralDiscreteScheduler"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def box_mask(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White in the box, black elsewhere."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


MASK = box_mask(13, 10, 45, 40)


def drawn(pipeline, request: GenerationRequest = REQUEST, image=PICTURE, mask=MASK, **options) -> Image.Image:
    """The first picture of a request with that picture and mask."""
    pictures = {"image_url": image} if mask is None else {"image_url": image, "mask_url": mask}
    return render(pipeline, request, inputs=made_ready(request, pictures), **options)[0]


def mixed(stock: Image.Image, image: Image.Image, mask: Image.Image) -> np.ndarray:
    """(height, width, 3) floats: the formula of a picture over another one."""
    share = np.asarray(mask, float)[..., None] / 255
    return np.asarray(stock) * share + np.asarray(image) * (1 - share)


def apart(found: Image.Image, expected: np.ndarray) -> float:
    """The largest difference of a channel, of 255."""
    return float(np.abs(np.asarray(found) - expected).max())


@pytest.mark.parametrize(
    ("scheduler", "scheduler_class"),
    [
        ("K_EULER_ANCESTRAL", EULER_A),
        ("DDIM", "DDIMScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("KLMS", "LMSDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_under_the_mask_it_is_what_diffusers_draws(scheduler: str, scheduler_class: str, strength: float, pipeline):
    arguments = {**CALL, "image": PICTURE, "mask_image": MASK, "strength": strength}
    (stock,) = by_diffusers(inpainting(pipeline), scheduler_class, **arguments)
    found = drawn(pipeline, replace(REQUEST, scheduler=scheduler, strength=strength))
    assert apart(found, mixed(stock, PICTURE, MASK)) <= 1
    # Plain diffusers changes every pixel that nobody asked it to.
    assert farthest(Image.composite(PICTURE, stock, MASK), PICTURE) > 5


@pytest.mark.parametrize("blur", [0.0, 2.0, 4.0])
def test_what_is_not_masked_keeps_every_bit(blur: float, pipeline):
    found = np.asarray(drawn(pipeline, replace(REQUEST, mask_blur=blur)))
    blurred = MASK.filter(ImageFilter.GaussianBlur(blur))
    kept = np.asarray(blurred) == 0
    assert kept.sum() > 1000
    assert np.array_equal(found[kept], np.asarray(PICTURE)[kept])
    (stock,) = by_diffusers(inpainting(pipeline), EULER_A, **CALL, image=PICTURE, mask_image=blurred, strength=0.75)
    assert apart(Image.fromarray(found), mixed(stock, PICTURE, blurred)) <= 1
    assert np.abs(found[~kept].astype(int) - np.asarray(PICTURE)[~kept]).mean() > 5


def test_the_mask_may_be_turned_round(pipeline):
    turned = Image.eval(MASK, lambda value: 255 - value)
    assert same(drawn(pipeline, replace(REQUEST, invert_mask=True), mask=turned), drawn(pipeline))


def test_with_a_lora_and_a_weighted_prompt(pipeline, engine: LoraEngine, tmp_path: Path):
    path, before = write_example_lora(tmp_path), weight_hash(pipeline)
    request = replace(REQUEST, prompt="a (lighthouse:1.4)", prompt_syntax="a1111", num_images=2)
    inputs = made_ready(request, {"image_url": PICTURE, "mask_url": MASK})
    with engine.applied([(engine.read(path), LoraScale.uniform(0.8))]):
        found = render(pipeline, request, inputs=inputs)
    assert weight_hash(pipeline) == before

    stock = copy.deepcopy(pipeline)
    stock.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="example")
    stock.set_adapters(["example"], [0.8])
    text, negative = encoded(stock, [[("a ", 1), ("lighthouse", 1.4)]]), encoded(stock, [[("fog", 1)]])
    embeds = {
        "prompt_embeds": text.states,
        "pooled_prompt_embeds": text.pooled,
        "negative_prompt_embeds": negative.states,
        "negative_pooled_prompt_embeds": negative.pooled,
    }
    call = {**CALL, "prompt": None, "negative_prompt": None, **embeds, "image": PICTURE, "mask_image": MASK}
    for seed, picture in zip((11, 12), found, strict=True):
        (expected,) = by_diffusers(inpainting(stock), EULER_A, seeds=(seed,), **call, strength=0.75)
        assert apart(picture, mixed(expected, PICTURE, MASK)) <= 1
    assert farthest(found[0], drawn(pipeline)) > 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_picture_of_a_batch_is_that_of_its_seed(scheduler: str, pipeline):
    request = replace(REQUEST, scheduler=scheduler)
    ready = made_ready(request, {"image_url": PICTURE, "mask_url": MASK})
    both = render(pipeline, replace(request, num_images=2), inputs=ready)
    assert farthest(both[1], drawn(pipeline, replace(request, seed=12))) <= 1
    assert farthest(*both) > 5


def test_image_and_mask_are_cropped_alike(pipeline):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 160, 3), dtype=np.uint8))
    # Half as large: scaled to the picture first. Of that the middle 96 x 96 is taken.
    mask = box_mask(40, 16, 56, 32, (80, 48))
    ready = made_ready(REQUEST, {"image_url": image, "mask_url": mask})
    middle = image.resize((64, 64), Image.Resampling.LANCZOS, box=(32, 0, 128, 96))
    assert farthest(ready["image_url"], middle) <= 1
    # From 48, 32 to 80, 64 of 96 pixels; scaled twice, its edge is three pixels wide.
    assert farthest(ready["mask_url"].crop((35, 25, 50, 39)), Image.new("L", (15, 14), 255)) == 0
    beside = np.asarray(ready["mask_url"]).copy()
    beside[19:45, 30:56] = 0
    assert not beside.any()
    found = drawn(pipeline, image=image, mask=mask)
    kept = np.asarray(ready["mask_url"]) == 0
    assert np.array_equal(np.asarray(found)[kept], np.asarray(ready["image_url"])[kept])


def test_the_noise_of_a_jpeg_is_not_a_mask():
    noisy = Image.eval(MASK, lambda value: 246 if value else 9)
    assert same(made_ready(REQUEST, {"image_url": PICTURE, "mask_url": noisy})["mask_url"], MASK)
    grey = Image.eval(MASK, lambda value: 200 if value else 0)
    assert same(made_ready(REQUEST, {"image_url": PICTURE, "mask_url": grey})["mask_url"], grey)


def test_a_white_mask_draws_all(pipeline):
    white = Image.new("L", (64, 64), 255)
    (stock,) = by_diffusers(inpainting(pipeline), EULER_A, **CALL, image=PICTURE, mask_image=white, strength=0.75)
    assert farthest(drawn(pipeline, mask=white), stock) <= 1


@pytest.mark.parametrize("mask", [Image.new("L", (64, 64), 0), box_mask(9, 9, 15, 15), Image.new("L", (64, 64), 99)])
def test_a_mask_that_leaves_nothing_is_refused(mask: Image.Image):
    with pytest.raises(InvalidRequest, match=r"^mask_url leaves nothing to redraw"):
        made_ready(REQUEST, {"image_url": PICTURE, "mask_url": mask})
    with pytest.raises(InvalidRequest, match=r"^mask leaves"):
        made_ready(replace(REQUEST, mask_url=None, mask="data:"), {"image_url": PICTURE, "mask_url": mask})


def test_strength_0_gives_the_picture_back(pipeline):
    assert same(drawn(pipeline, replace(REQUEST, strength=0.0)), PICTURE)


def test_progress_and_a_stop(pipeline):
    seen: list[tuple[int, int]] = []
    drawn(pipeline, on_step=lambda step, total, _latents: seen.append((step, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    before = weight_hash(pipeline)

    def stop(*_: object) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        drawn(pipeline, on_step=stop)
    assert weight_hash(pipeline) == before


def _parameters() -> set[int]:
    """The storages of all parameters of this process; those that a worker in another test froze count too."""
    gc.unfreeze()
    return {thing.untyped_storage().data_ptr() for thing in gc.get_objects() if type(thing) is torch.nn.Parameter}


def test_no_weight_is_there_twice(pipeline):
    """Counted by the storage that each tensor lies in."""

    def storages(parts: dict[str, Any]) -> set[int]:
        modules = [part for part in parts.values() if hasattr(part, "parameters")]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    from sdxl_worker.generate.modes import mode_for

    ready = made_ready(REQUEST, {"image_url": PICTURE, "mask_url": MASK})
    before = storages(pipeline.components)
    (only,) = mode_for(ready).passes(pipeline, REQUEST, ready)
    assert storages(only.view.components) == before
    everything, during = _parameters(), set()
    render(pipeline, REQUEST, inputs=ready, on_step=lambda *_: during.update(_parameters()))
    assert during
    assert during <= everything
    assert storages(pipeline.components) == before


FULL_RES = replace(REQUEST, inpaint_full_res=True, inpaint_padding=4)
LARGE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (96, 160, 3), dtype=np.uint8))


def test_only_what_is_around_the_mask_is_drawn_at_the_full_size(pipeline):
    mask = box_mask(100, 40, 124, 52, LARGE.size)
    # 4 pixels more on each side, and as high as wide.
    box = (96, 30, 128, 62)
    found = drawn(pipeline, FULL_RES, LARGE, mask)
    assert found.size == (160, 96)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(found)[kept], np.asarray(LARGE)[kept])

    part = LARGE.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    part_mask = mask.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    (stock,) = by_diffusers(inpainting(pipeline), EULER_A, **CALL, image=part, mask_image=part_mask, strength=0.75)
    expected = LARGE.copy()
    expected.paste(stock.resize((32, 32), Image.Resampling.LANCZOS), box[:2])
    assert apart(found, mixed(expected, LARGE, mask)) <= 1
    # And what diffusers itself makes of it.
    (stock,) = by_diffusers(
        inpainting(pipeline), EULER_A, **CALL, image=LARGE, mask_image=mask, padding_mask_crop=4, strength=0.75
    )
    assert farthest(found, stock.convert("RGB")) <= 1


@pytest.mark.parametrize(
    ("masked", "padding", "size", "box"),
    [
        # Inside; at the corner it moves in; a wide request; as large as the picture.
        ((100, 40, 124, 52), 4, (64, 64), (96, 30, 128, 62)),
        ((150, 0, 160, 10), 4, (64, 64), (146, 0, 160, 14)),
        ((150, 90, 160, 96), 0, (64, 64), (150, 86, 160, 96)),
        ((80, 40, 90, 60), 0, (128, 64), (65, 40, 105, 60)),
        ((0, 0, 160, 96), 32, (160, 96), (0, 0, 160, 96)),
        # Wider than the picture is high: around its middle.
        ((10, 40, 140, 50), 0, (64, 64), (10, -17, 140, 113)),
        ((10, 0, 20, 96), 32, (320, 64), (-160, 0, 320, 96)),
    ],
)
def test_the_box_around_the_mask(masked: Box, padding: int, size: tuple[int, int], box: Box):
    assert crop_box(box_mask(*masked, size=(160, 96)), padding, size) == box


def test_a_box_beyond_the_picture_repeats_its_edge_and_pastes_what_lies_inside(pipeline):
    mask = box_mask(10, 40, 140, 50, LARGE.size)
    ready = made_ready(FULL_RES, {"image_url": LARGE, "mask_url": mask})
    arguments = inpaint.arguments(replace(FULL_RES, width=130, height=130, inpaint_padding=0), ready)
    whole = np.pad(np.asarray(LARGE), ((17, 17), (0, 0), (0, 0)), mode="edge")[:, 10:140]
    assert np.array_equal(np.asarray(arguments["image"]), whole)
    found = drawn(pipeline, replace(FULL_RES, inpaint_padding=0), LARGE, mask)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(found)[kept], np.asarray(LARGE)[kept])
    assert farthest(found, LARGE) > 5


def test_the_full_size_has_a_bound():
    large = Image.new("RGB", (4097, 4096))
    with pytest.raises(InvalidRequest, match=r"^image_url leads to a picture of more than 16777216 pixels"):
        made_ready(FULL_RES, {"image_url": large, "mask_url": MASK})
    assert made_ready(REQUEST, {"image_url": large, "mask_url": MASK})["image_url"].size == (64, 64)


def test_what_is_cut_out_in_the_request_s_shape_has_a_bound():
    """A wide mask in a high request: 16384 x 524288 pixels would take 24 GB."""
    wide = {"image_url": Image.new("RGB", (16384, 8)), "mask_url": Image.new("L", (16384, 8), 255)}
    with pytest.raises(InvalidRequest, match=r"^inpaint_full_res would cut out 16384 x 524288 pixels around the mask"):
        made_ready(replace(FULL_RES, width=64, height=2048), wide)


# The picture is 64 x 64; what the request says of the answer's size has the extension in it.
EXTENDED = replace(REQUEST, mask_url=None, width=96, height=80, extend=Extend(left=32, bottom=16))


def test_beyond_the_picture(pipeline):
    found = np.asarray(drawn(pipeline, EXTENDED, mask=None))
    assert found.shape == (80, 96, 3)
    # A quarter of the picture beside each extension is drawn too.
    assert np.array_equal(found[:48, 48:], np.asarray(PICTURE)[:48, 16:])
    mask = Image.new("L", (96, 80), 255)
    mask.paste(0, (48, 0, 96, 48))
    canvas = np.pad(np.asarray(PICTURE), ((0, 16), (32, 0), (0, 0)), mode="symmetric")
    start = Image.fromarray(canvas).filter(ImageFilter.GaussianBlur(16))
    start.paste(PICTURE, (32, 0))
    call = {**CALL, "width": 96, "height": 80, "image": start, "mask_image": mask, "strength": 0.9}
    (stock,) = by_diffusers(inpainting(pipeline), EULER_A, **call)
    assert apart(Image.fromarray(found), mixed(stock, start, mask)) <= 1


def test_beyond_the_picture_and_a_mask_in_it():
    request = replace(EXTENDED, mask_url="https://a/c.png")
    pictures = {"image_url": PICTURE, "mask_url": box_mask(40, 8, 56, 24)}
    mask = np.asarray(made_ready(request, pictures)["mask_url"])
    expected = np.full((80, 96), 255)
    expected[:48, 48:] = 0
    expected[8:24, 72:88] = 255
    assert np.array_equal(mask, expected)


def test_an_extension_larger_than_the_picture():
    request = replace(EXTENDED, width=64 + 200, height=64, extend=Extend(right=200))
    ready = made_ready(request, {"image_url": PICTURE})
    assert ready["image_url"].size == ready["mask_url"].size == (264, 64)
    assert same(ready["image_url"].crop((0, 0, 64, 64)), PICTURE)


@pytest.fixture(scope="module")
def nine_channels():
    """A tiny inpainting checkpoint."""
    pipeline = topology.build_sdxl(in_channels=9)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval().requires_grad_(False)
    return pipeline


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_checkpoint_for_inpainting_sees_the_mask(strength: float, nine_channels):
    arguments = {**CALL, "image": PICTURE, "mask_image": MASK, "strength": strength}
    (stock,) = by_diffusers(inpainting(nine_channels), EULER_A, **arguments)
    found = render(
        nine_channels,
        replace(REQUEST, strength=strength, num_images=2),
        inputs=made_ready(REQUEST, {"image_url": PICTURE, "mask_url": MASK}),
    )
    assert apart(found[0], mixed(stock, PICTURE, MASK)) <= 1
    alone = drawn(nine_channels, replace(REQUEST, strength=strength, seed=12))
    assert farthest(found[1], alone) <= 1


def test_a_checkpoint_for_inpainting_loads_from_a_folder_and_from_a_file(nine_channels, tmp_path: Path):
    inpainting(nine_channels).save_pretrained(tmp_path / "model")
    (tmp_path / "file").mkdir()
    save_single_file(nine_channels, tmp_path / "file" / "model.safetensors")
    save_configs(inpainting(nine_channels), tmp_path / "file" / "model")
    for model in (tmp_path / "model", tmp_path / "file" / "model.safetensors"):
        loaded, _ = load_pipeline(Settings(model_id=str(model), lora_cache_dir=tmp_path / "loras"))
        assert farthest(drawn(loaded), drawn(nine_channels)) <= 1


@pytest.mark.parametrize("fields", [{}, {"image": "data:image/png;base64,AAAA"}])
def test_a_checkpoint_for_inpainting_draws_nothing_else(fields: dict[str, str], nine_channels, tmp_path: Path):
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path))
    worker.resident.use(nine_channels)
    assert worker.run({"input": {"prompt": "a", "width": 64, "height": 64, **fields}}) == {
        "error": "INVALID_INPUT: this worker's base model is an inpainting checkpoint: it needs image_url, and "
        "mask_url or extend"
    }
