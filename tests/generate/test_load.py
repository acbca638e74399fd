"""The resident pipeline, loaded from every kind of place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image
from safetensors.torch import load_file

from sdxl_worker import topology
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate import load
from sdxl_worker.generate.base_model import BaseModel
from sdxl_worker.generate.load import _from_files, load_pipeline
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.settings import Settings
from tests.support.fresh_process import cost_of
from tests.support.lora_files import save, weight_hash
from tests.support.pictures import farthest, same
from tests.support.single_file import save_configs, save_single_file

REQUEST = GenerationRequest("a lighthouse", "fog", height=64, width=96, seed=11, num_inference_steps=4)


def _settings(tmp_path: Path, model_id: object) -> Settings:
    return Settings.from_environment({"MODEL_ID": str(model_id), "LORA_CACHE_DIR": str(tmp_path / "loras")})


def test_tiny_is_thesame_every_time_and_brings_its_lora(tmp_path: Path):
    first, second = (load_pipeline(_settings(tmp_path, "tiny"))[0] for _ in range(2))
    assert weight_hash(first) == weight_hash(second)
    assert (tmp_path / "loras" / topology.EXAMPLE_LORA).is_file()
    assert not any(parameter.requires_grad for parameter in first.unet.parameters())


def test_what_was_found_comes_back_with_the_pipeline(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    _, model = load_pipeline(_settings(tmp_path, tmp_path / "model"))
    assert model == BaseModel("folder", tmp_path / "model", "model", allow_vae_override=False)


def test_tiny_loads_where_its_lora_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "loras").write_text("a file where the folder should be")
    assert load_pipeline(_settings(tmp_path, "tiny"))[0].unet is not None
    assert "cannot be written" in caplog.text


def test_a_local_folder_is_served(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    loaded, _ = load_pipeline(_settings(tmp_path, tmp_path / "model"))
    # Weights at another alignment in memory: CPU kernels may round the last bit differently.
    assert farthest(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0]) <= 1


def test_a_local_folder_needs_no_look_at_the_hub(pipeline, tmp_path: Path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    asked: list[object] = []

    def not_known(*names: object, **_: object) -> None:
        asked.append(names)
        raise socket.gaierror

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", not_known)
    assert load_pipeline(_settings(tmp_path, tmp_path / "model"))[0].unet is not None
    assert asked == []


def test_half_precision_weights_of_a_folder_are_used(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    loaded, _ = load_pipeline(_settings(tmp_path, tmp_path / "model"))
    # Weights at another alignment in memory: CPU kernels may round the last bit differently.
    assert farthest(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0]) <= 1


def test_loading_shows_no_progress_bars(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    code = (
        "from sdxl_worker.generate.load import load_pipeline; from sdxl_worker.settings import Settings; "
        "from diffusers.utils import logging as d; from transformers.utils import logging as t; "
        "load_pipeline(Settings.from_environment()); "
        "assert d.is_progress_bar_enabled() and t.is_progress_bar_enabled()"
    )
    environment = {**os.environ, "MODEL_ID": str(tmp_path / "model"), "LORA_CACHE_DIR": str(tmp_path / "loras")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_single_file_is_served(pipeline, tmp_path: Path):
    checkpoint = save_single_file(pipeline, tmp_path / "model.safetensors")
    save_configs(pipeline, tmp_path / "model")
    loaded, _ = load_pipeline(_settings(tmp_path, checkpoint))
    assert farthest(render(loaded, REQUEST)[0], render(pipeline, REQUEST)[0]) <= 1


def test_an_inpainting_checkpoint_is_served_from_a_single_file(tmp_path: Path):
    original = topology.build_sdxl(in_channels=9)
    checkpoint = save_single_file(original, tmp_path / "model.safetensors")
    save_configs(original, tmp_path / "model")
    loaded, _ = load_pipeline(_settings(tmp_path, checkpoint))
    image, mask = Image.linear_gradient("L").convert("RGB").resize((64, 64)), Image.new("L", (64, 64), 255)
    request = replace(REQUEST, width=64, scheduler="K_EULER", guidance_scale=5.5, strength=1.0)
    (picture,) = render(loaded, request, inputs={"image_url": image, "mask_url": mask})
    stock = StableDiffusionXLInpaintPipeline(**original.components)
    (expected,) = stock(
        prompt="a lighthouse",
        negative_prompt="fog",
        image=image,
        mask_image=mask,
        width=64,
        height=64,
        strength=1.0,
        num_inference_steps=4,
        guidance_scale=5.5,
        generator=torch.Generator().manual_seed(11),
    ).images
    assert farthest(picture, expected) <= 1


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_a_vae_in_one_file_takes_the_place_of_the_models_own(naming: str, pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    other = topology.build_sdxl(seed=5)
    weights = {name: value.contiguous() for name, value in other.vae.state_dict().items()}
    if naming == "original":
        whole, prefix = load_file(save_single_file(other, tmp_path / "whole.safetensors")), "first_stage_model."
        weights = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    model = BaseModel("folder", tmp_path / "model", "model", allow_vae_override=True)
    loaded = _from_files(model, save(tmp_path / "vae.safetensors", weights), torch.float32)
    for name, value in other.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], value), name


def test_a_single_file_of_something_else_is_one_sentence(tmp_path: Path, caplog):
    checkpoint = save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors cannot be loaded"):
        load_pipeline(_settings(tmp_path, checkpoint))
    assert "Traceback" not in caplog.text


def test_weights_that_are_cut_off_are_one_sentence(pipeline, tmp_path: Path, caplog):
    pipeline.save_pretrained(tmp_path / "model")
    with (tmp_path / "model" / "text_encoder" / "model.safetensors").open("r+b") as weights:
        weights.truncate(5000)
    with pytest.raises(ModelUnavailable, match="not a complete SDXL model"):
        load_pipeline(_settings(tmp_path, tmp_path / "model"))
    assert "Traceback" not in caplog.text


def test_a_model_that_does_not_fit_the_device_says_so(pipeline, tmp_path: Path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(type(pipeline), "to", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(ModelUnavailable, match="memory"):
        load_pipeline(_settings(tmp_path, tmp_path / "model"))


@pytest.mark.parametrize("model_id", ["missing/folder/of/model", "nobody/nothing", "/nowhere/model.safetensors"])
def test_a_missing_model_is_one_sentence(model_id: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sdxl_worker.generate.model_repo.RETRY_S", 0.0)
    with pytest.raises(ModelUnavailable, match="MODEL_ID"):
        load_pipeline(_settings(tmp_path, model_id))


def test_a_broken_model_is_one_sentence(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="not a complete SDXL model"):
        load_pipeline(_settings(tmp_path, tmp_path / "model"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_weights_of_a_folder_go_straight_to_the_device(device: str, pipeline, tmp_path: Path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    vae = topology.build_sdxl(seed=5).vae
    vae.save_pretrained(tmp_path / "vae")
    # On the CPU weights stay mapped, and these options are not used: here they are, to see what they do.
    monkeypatch.setattr(load, "_straight_to", lambda device: {"device_map": device})
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = BaseModel("folder", tmp_path / "model", "model", allow_vae_override=True)
    loaded = _from_files(model, tmp_path / "vae", dtype, device)
    for name, original in (("unet", pipeline.unet), ("text_encoder_2", pipeline.text_encoder_2), ("vae", vae)):
        module = getattr(loaded, name)
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {device}
        assert not any(hasattr(part, "_hf_hook") for part in module.modules())
        weights = module.state_dict()
        for key, value in original.state_dict().items():
            assert torch.equal(weights[key].cpu(), value.to(dtype) if value.is_floating_point() else value), key
    assert loaded.to(device).device.type == device


@pytest.mark.gpu
def test_half_precision_weights_are_never_all_in_host_memory(tmp_path: Path):
    """The files are of twice the precision: what is converted on the CPU is as much as the device gets."""
    for name, size in (("small", topology.TINY), ("model", topology.NARROW)):
        topology.build_sdxl(size).save_pretrained(tmp_path / name)
    setup = (
        "import torch\n"
        "from diffusers import StableDiffusionXLPipeline\n"
        "from sdxl_worker.generate.load import load_pipeline\n"
        "from sdxl_worker.settings import Settings\n"
        "def stock(folder):\n"
        "    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float16).to('cuda')\n"
        "def ours(folder):\n"
        "    return load_pipeline(Settings(model_id=folder))[0]\n"
    )
    # The first load of a process brings the device's context and libraries into its memory.
    grown = {
        way: cost_of(f"kept = {way}({str(tmp_path / 'model')!r})", f"{setup}{way}({str(tmp_path / 'small')!r})")[0]
        for way in ("stock", "ours")
    }
    in_half = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors")) // 2
    assert grown["ours"] < grown["stock"] - in_half // 2


@pytest.mark.gpu
def test_half_precision_on_the_gpu_gives_thesame_bits_twice(tmp_path: Path):
    pipeline, _ = load_pipeline(_settings(tmp_path, "tiny"))
    assert pipeline.device.type == "cuda"
    assert pipeline.unet.dtype == torch.float16
    assert same(render(pipeline, REQUEST)[0], render(pipeline, REQUEST)[0])
