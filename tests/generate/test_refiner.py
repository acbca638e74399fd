"""The refiner: the pictures of diffusers' two pipelines called one after the other, on the base model's own weights."""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sdxl_worker import topology
from sdxl_worker.errors import Cancelled, ModelUnavailable
from sdxl_worker.generate import batches
from sdxl_worker.generate import refiner as refiner_module
from sdxl_worker.generate.refiner import Refiner, load_refiner
from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import GenerationRequest, LoraScale
from sdxl_worker.settings import Settings
from tests.support.lora_files import kohya, lora, save, weight_hash, whole_unet
from tests.support.pictures import farthest, same
from tests.support.plain_sdxl import Chunks, Text, encoded
from tests.support.single_file import save_single_file
from tests.support.vivid import made_vivid

SAMPLERS = [
    ("K_EULER", "EulerDiscreteScheduler"),
    ("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler"),
    ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
]
EULER = "EulerDiscreteScheduler"
# As the worker hands it on: with the name of its refiner.
REQUEST = GenerationRequest(
    "a lighthouse",
    "fog",
    height=64,
    width=96,
    seed=11,
    scheduler="K_EULER",
    num_inference_steps=5,
    guidance_scale=5.5,
    refiner="tiny",
    refiner_inference_steps=10,
    given=frozenset({"refiner_inference_steps"}),
)
GOES_ON = replace(REQUEST, high_noise_frac=0.6, refiner_inference_steps=None, given=frozenset({"high_noise_frac"}))
WORDS = {"prompt": "a lighthouse", "negative_prompt": "fog"}
BASE: dict[str, Any] = {"num_inference_steps": 5, "height": 64, "width": 96}
TOP: dict[str, Any] = {"num_inference_steps": 10, "strength": 0.3}


@pytest.fixture(scope="module")
def vivid() -> tuple[Any, Refiner]:
    """A tiny SDXL and its refiner, on whose pictures every word and weight shows."""
    base = topology.build_sdxl()
    refiner = made_vivid(base)
    embedding = refiner.pipeline.unet.add_embedding
    with torch.no_grad():
        for layer in (embedding.linear_1, embedding.linear_2):
            layer.weight.mul_(4)
    return base, refiner


@pytest.fixture
def pipeline(vivid) -> Any:
    """Float32 on the CPU; tests put back what they change."""
    return vivid[0]


@pytest.fixture
def refiner(vivid) -> Refiner:
    """The refiner on `pipeline`."""
    return vivid[1]


def refined(pipeline: Any, refiner: Refiner, request: GenerationRequest, **options: Any) -> list[Image.Image]:
    return render(pipeline, request, refining=refiner.ready_for(request), **options)


def by_hand(
    pipeline: Any,
    refiner: Refiner,
    base: dict[str, Any],
    top: dict[str, Any],
    *,
    scheduler: str = EULER,
    words: dict[str, Any] = WORDS,
    refiner_words: dict[str, Any] | None = None,
    text_encoder_2: Any = None,
) -> Image.Image:
    """Diffusers' two pipelines as its documentation calls them; the generator of seed 11 goes from one to the other."""
    first = diffusers.StableDiffusionXLPipeline(**pipeline.components)
    second = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=pipeline.vae,
        text_encoder=None,
        text_encoder_2=text_encoder_2 or pipeline.text_encoder_2,
        tokenizer=None,
        tokenizer_2=pipeline.tokenizer_2,
        unet=refiner.pipeline.unet,
        scheduler=refiner.pipeline.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    for view in (first, second):
        view.scheduler = getattr(diffusers, scheduler).from_config(view.scheduler.config)
        view.set_progress_bar_config(disable=True)
    common = {"generator": torch.Generator().manual_seed(11), "guidance_scale": 5.5}
    latents = first(**words, **base, **common, output_type="latent").images
    return second(**(refiner_words or words), **top, **common, image=latents).images[0]


@pytest.mark.parametrize(("name", "class_name"), SAMPLERS)
def test_the_refiner_noises_the_base_models_latents_anew_and_redraws_them(name, class_name, pipeline, refiner):
    """What worker-sdxl calls without high_noise_frac."""
    expected = by_hand(pipeline, refiner, BASE, TOP, scheduler=class_name)
    (actual,) = refined(pipeline, refiner, replace(REQUEST, scheduler=name))
    assert farthest(actual, expected) <= 1
    assert farthest(actual, render(pipeline, replace(REQUEST, scheduler=name))[0]) > 5


@pytest.mark.parametrize(("name", "class_name"), SAMPLERS)
def test_high_noise_frac_alone_is_where_the_refiner_goes_on(name, class_name, pipeline, refiner):
    """diffusers' documentation: denoising_end and denoising_start of the same share."""
    top = {"num_inference_steps": 5, "denoising_start": 0.6}
    expected = by_hand(pipeline, refiner, {**BASE, "denoising_end": 0.6}, top, scheduler=class_name)
    request = replace(GOES_ON, scheduler=name)
    assert farthest(refined(pipeline, refiner, request)[0], expected) <= 1


@pytest.mark.parametrize("strength", [None, 0.5])
def test_both_fields_are_worker_sdxls_call(strength, pipeline, refiner):
    """Its default strength is 0.3."""
    expected = by_hand(pipeline, refiner, {**BASE, "denoising_end": 0.6}, {**TOP, "strength": strength or 0.3})
    given = {"high_noise_frac"} | ({"strength"} if strength else set())
    request = replace(REQUEST, high_noise_frac=0.6, strength=strength, given=REQUEST.given | given)
    assert farthest(refined(pipeline, refiner, request)[0], expected) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_0_or_1_is_none(share, pipeline, refiner):
    expected = by_hand(pipeline, refiner, BASE, TOP)
    assert farthest(refined(pipeline, refiner, replace(REQUEST, high_noise_frac=share))[0], expected) <= 1
    assert refiner.ready_for(replace(GOES_ON, high_noise_frac=share)) is None


@pytest.mark.parametrize(
    "changes", [{"refiner_inference_steps": None}, {"refiner_inference_steps": 0}, {"refiner": ""}, {"strength": 0.0}]
)
def test_the_refiner_draws_only_where_it_is_asked_to(changes, refiner):
    assert refiner.ready_for(replace(REQUEST, **changes)) is None


def test_with_a_picture_the_refiner_alone_redraws_it(pipeline, refiner):
    """As worker-sdxl does, but at the request's size."""
    start = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    request = replace(REQUEST, image_url="https://example.com/a.png", strength=0.6)
    view = copy.copy(refiner.pipeline)
    view.scheduler = diffusers.EulerDiscreteScheduler.from_config(view.scheduler.config)
    common = {"generator": torch.Generator().manual_seed(11), "guidance_scale": 5.5}
    (expected,) = view(**WORDS, **common, image=start, num_inference_steps=10, strength=0.6).images
    (actual,) = refined(pipeline, refiner, request, inputs={"image_url": start})
    assert farthest(actual, expected) <= 1


def test_a_negative_prompt_left_out_is_encoded_as_the_refiners_config_says(pipeline, refiner):
    words = {"prompt": "a lighthouse"}
    expected = by_hand(pipeline, refiner, BASE, TOP, words=words)
    assert farthest(refined(pipeline, refiner, replace(REQUEST, negative_prompt=None))[0], expected) <= 1


def arguments(prompt: Text, negative: Text) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": prompt.states,
        "pooled_prompt_embeds": prompt.pooled,
        "negative_prompt_embeds": negative.states,
        "negative_pooled_prompt_embeds": negative.pooled,
    }


# Little in the UNet, whose latents would leave the refiner nothing to change.
SCALE = LoraScale(unet=0.1)


def lora_file(pipeline: Any, folder: Any) -> tuple[Any, dict[tuple[str, str], torch.Tensor]]:
    """A LoRA for UNet and text encoder 2, and what it adds to each weight."""
    tensors, in_unet = whole_unet(pipeline.unet, "LoRA")
    changes = {("unet", name): change for name, change in in_unet.items()}
    for name, module in pipeline.text_encoder_2.named_modules():
        if name.endswith(("q_proj", "fc1")):
            part, change = lora(module.weight)
            tensors |= kohya(name, part, "lora_te2_")
            changes["text_encoder_2", name] = change
    return save(folder / "lora.safetensors", tensors), changes


@pytest.mark.parametrize("request_", [REQUEST, GOES_ON], ids=["anew", "goes on"])
def test_a_lora_and_weights_in_the_prompt(request_, pipeline, refiner, tmp_path):
    """The LoRA is in the base model alone: the refiner's words come from the text encoder without it."""
    file, changes = lora_file(pipeline, tmp_path)
    prompt: Chunks = [[("a ", 1), ("lighthouse", 1.6), (" at night", 1)]]
    negative: Chunks = [[("fog", 1.3)]]
    request = replace(
        request_, prompt="a (lighthouse:1.6) at night", negative_prompt="(fog:1.3)", prompt_syntax="a1111"
    )
    merged = copy.deepcopy(pipeline.components)
    for (component, name), change in changes.items():
        share = getattr(SCALE, component)
        merged[component].get_submodule(name).weight.data += share * change.float()
    by = diffusers.StableDiffusionXLPipeline(**merged)
    words = arguments(encoded(by, prompt), encoded(by, negative))
    plain = arguments(encoded(refiner.pipeline, prompt), encoded(refiner.pipeline, negative))
    changed = arguments(
        *(replace(encoded(by, text), states=encoded(by, text).states[..., 16:]) for text in (prompt, negative))
    )
    shares = request_.high_noise_frac is not None
    base = {**BASE, "denoising_end": 0.6} if shares else BASE
    top = {"num_inference_steps": 5, "denoising_start": 0.6} if shares else TOP
    expected, other = (
        by_hand(by, refiner, base, top, words=words, refiner_words=refiner_words) for refiner_words in (plain, changed)
    )
    assert farthest(expected, other) > 2, "the test has to tell the two apart"
    before = weight_hash(pipeline), weight_hash(Both(pipeline, refiner))
    engine = LoraEngine(pipeline, 2**30)
    refining = refiner.ready_for(request)
    with engine.applied([(engine.read(file), SCALE)]):
        (actual,) = render(pipeline, request, refining=refining)
    assert farthest(actual, expected) <= 1
    assert (weight_hash(pipeline), weight_hash(Both(pipeline, refiner))) == before


class Both:
    """The base model's text encoders and VAE with the refiner's UNet, for `weight_hash`."""

    def __init__(self, pipeline: Any, refiner: Refiner) -> None:
        self.text_encoder, self.text_encoder_2, self.vae = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae
        self.unet, self.scheduler = refiner.pipeline.unet, refiner.pipeline.scheduler


def test_a_long_prompt(pipeline, refiner):
    prompt, negative = [[("x " * 75, 1.0)], [("y", 1.0)]], [[("fog", 1.0)], [("fog", 1.0)]]
    request = replace(REQUEST, prompt="x " * 75 + "y", prompt_syntax="a1111")
    words, refiner_words = (
        arguments(encoded(view, prompt), encoded(view, negative)) for view in (pipeline, refiner.pipeline)
    )
    expected = by_hand(pipeline, refiner, BASE, TOP, words=words, refiner_words=refiner_words)
    assert farthest(refined(pipeline, refiner, request)[0], expected) <= 1


@pytest.mark.parametrize("request_", [REQUEST, GOES_ON], ids=["anew", "goes on"])
def test_each_picture_is_that_of_its_seed_alone(request_, pipeline, refiner, monkeypatch):
    """The generator of a picture goes on from the base model's pass, also one that draws noise at every step."""
    request = replace(request_, scheduler="K_EULER_ANCESTRAL", num_images=3)
    alone = [refined(pipeline, refiner, replace(request, num_images=1, seed=seed))[0] for seed in (11, 12, 13)]
    together = refined(pipeline, refiner, request)
    assert all(farthest(*pair) <= 1 for pair in zip(together, alone, strict=True))
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 2 * 64 * 96)
    in_batches = refined(pipeline, refiner, request)
    assert all(farthest(*pair) <= 1 for pair in zip(in_batches, alone, strict=True))


@pytest.mark.parametrize(("request_", "total"), [(REQUEST, 8), (GOES_ON, 5)], ids=["anew", "goes on"])
def test_steps_are_counted_over_both_passes_and_all_batches(request_, total, pipeline, refiner, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 64 * 96)
    steps: list[tuple[int, int]] = []
    shares: list[float] = []
    (first, _) = refined(
        pipeline,
        refiner,
        replace(request_, num_images=2),
        on_step=lambda step, total, _latents: steps.append((step, total)),
        before_step=shares.append,
    )
    assert steps == [(step, 2 * total) for step in range(1, 2 * total + 1)]
    # LoRAs that change over the run are the base model's.
    in_base = 5 if request_ is REQUEST else 3
    assert shares == pytest.approx([step / in_base for step in range(in_base)] * 2)
    assert same(first, refined(pipeline, refiner, request_)[0])


def storages(*pipelines: Any) -> set[int]:
    parts = [part for pipeline in pipelines for part in pipeline.components.values()]
    return storages_of(*(part for part in parts if isinstance(part, torch.nn.Module)))


def storages_of(*modules: torch.nn.Module) -> set[int]:
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_no_weight_is_there_twice(pipeline, refiner):
    assert refiner.pipeline.text_encoder_2 is pipeline.text_encoder_2
    assert refiner.pipeline.vae is pipeline.vae
    own = storages_of(refiner.pipeline.unet)
    assert storages(pipeline, refiner.pipeline) == storages(pipeline) | own
    assert not storages(pipeline) & own


def stop_at(last: int) -> Any:
    def stop(step: int, _total: int, _latents: torch.Tensor) -> None:
        if step == last:
            raise Cancelled("stopped")

    return stop


@pytest.mark.parametrize("last", [2, 6, 8])
@pytest.mark.parametrize("waits", [False, True])
def test_a_job_stopped_in_either_pass_leaves_everything_as_it_was(waits, last, pipeline, refiner):
    refiner = replace(refiner, waits_in_host_memory=waits)
    before = weight_hash(pipeline), weight_hash(Both(pipeline, refiner)), storages(pipeline, refiner.pipeline)
    schedulers = pipeline.scheduler, refiner.pipeline.scheduler
    with pytest.raises(Cancelled):
        refined(pipeline, refiner, REQUEST, on_step=stop_at(last))
    assert (weight_hash(pipeline), weight_hash(Both(pipeline, refiner)), storages(pipeline, refiner.pipeline)) == before
    assert (pipeline.scheduler, refiner.pipeline.scheduler) == schedulers


def test_a_unet_that_waits_elsewhere_is_moved_for_its_turn_alone(pipeline, refiner):
    expected = refined(pipeline, refiner, REQUEST)[0]
    waiting = replace(refiner, waits_in_host_memory=True)
    home = {parameter.data_ptr() for parameter in refiner.pipeline.unet.parameters()}
    moved: list[bool] = []

    def look(_step: int, _total: int, _latents: torch.Tensor) -> None:
        moved.append(home.isdisjoint(parameter.data_ptr() for parameter in refiner.pipeline.unet.parameters()))

    assert farthest(refined(pipeline, waiting, REQUEST, on_step=look)[0], expected) <= 1
    assert moved == [False] * 5 + [True] * 3
    assert {parameter.data_ptr() for parameter in refiner.pipeline.unet.parameters()} == home


def resident(pipeline: Any, refiner_id: Any) -> Refiner:
    refiner = load_refiner(Settings(refiner_id=str(refiner_id)), pipeline)
    assert refiner is not None
    return refiner


def test_without_refiner_id_there_is_none(pipeline):
    assert load_refiner(Settings(), pipeline) is None


def test_the_tiny_refiner_is_the_same_every_time(pipeline):
    first, second = (resident(pipeline, "tiny") for _ in range(2))
    assert weight_hash(Both(pipeline, first)) == weight_hash(Both(pipeline, second))
    assert first.title == second.title == f"tiny [{first.hash.result()}]"
    assert len(first.hash.result()) == 10
    assert not any(parameter.requires_grad for parameter in first.pipeline.unet.parameters())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_without_the_shared_parts_is_served(variant, pipeline, refiner, tmp_path):
    refiner.pipeline.save_pretrained(tmp_path / "refiner", variant=variant)
    for folder in ("vae", "text_encoder_2"):
        shutil.rmtree(tmp_path / "refiner" / folder)
    loaded = resident(pipeline, tmp_path / "refiner")
    assert loaded.pipeline.config.requires_aesthetics_score is True
    assert storages(pipeline, loaded.pipeline) == storages(pipeline) | storages_of(loaded.pipeline.unet)
    expected = refined(pipeline, refiner, REQUEST)[0]
    assert farthest(refined(pipeline, loaded, REQUEST)[0], expected) <= 1


def test_a_folder_with_something_else_is_one_sentence(pipeline, refiner, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelUnavailable, match=r"base is not an SDXL refiner: .*check REFINER_ID"):
        resident(pipeline, tmp_path / "base")
    (tmp_path / "base" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=r"the refiner base cannot be loaded: .*check REFINER_ID"):
        resident(pipeline, tmp_path / "base")


def test_a_file_with_something_else_is_one_sentence(pipeline, tmp_path):
    file = save_single_file(pipeline, tmp_path / "base.safetensors")
    with pytest.raises(ModelUnavailable, match=r"base.safetensors is a checkpoint of SDXL, not an SDXL refiner"):
        resident(pipeline, file)


GIB = 2**30


@pytest.mark.parametrize(("free", "waits"), [(6.5, False), (5.5, True)])
def test_where_the_unet_is_follows_from_the_free_memory(free, waits, pipeline, monkeypatch, caplog):
    """A stand-in for the GPU's figure: 6 GB have to stay for drawing."""
    caplog.set_level(logging.INFO, "sdxl_worker")
    monkeypatch.setattr(refiner_module, "room_on", lambda _device: int(free * GIB))
    refiner = resident(pipeline, "tiny")
    assert refiner.waits_in_host_memory is waits
    assert ("page-locked host memory, and is moved for its turn" in caplog.text) is waits
    assert f"{free} GB were free beside the base model" in caplog.text


def test_no_room_even_for_its_turn_is_one_sentence(pipeline, monkeypatch):
    monkeypatch.setattr(refiner_module, "room_on", lambda _device: int(3.9 * GIB))
    with pytest.raises(ModelUnavailable, match=r"only 3\.9 GB are free .*set REFINER_ID to empty"):
        resident(pipeline, "tiny")


def test_batches_leave_room_for_its_turn():
    from sdxl_worker.generate.batches import BYTES_PER_PIXEL

    gpu, pixels = torch.device("cuda"), 1024 * 1024
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "free_bytes", lambda _device: 4 * pixels * BYTES_PER_PIXEL)
        assert batches.most_at_once(gpu, pixels) == 4
        assert batches.most_at_once(gpu, pixels, 3 * pixels * BYTES_PER_PIXEL) == 1


@pytest.mark.gpu
def test_on_a_gpu_it_waits_in_page_locked_memory(monkeypatch):
    base = topology.build_sdxl(device="cuda", dtype=torch.float16)
    base.set_progress_bar_config(disable=True)
    monkeypatch.setattr(refiner_module, "room_on", lambda _device: int(5.5 * GIB))
    refiner = resident(base, "tiny")
    parameters = list(refiner.pipeline.unet.parameters())
    assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in parameters)
    seen: list[str] = []
    (picture,) = refined(base, refiner, REQUEST, on_step=lambda *_: seen.append(refiner.pipeline.unet.device.type))
    assert seen == ["cpu"] * 5 + ["cuda"] * 3
    assert all(parameter.is_pinned() for parameter in parameters)
    monkeypatch.undo()
    assert farthest(refined(base, resident(base, "tiny"), REQUEST)[0], picture) <= 1
