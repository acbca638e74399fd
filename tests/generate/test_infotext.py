"""The text in a picture, read back the way A1111 reads it."""

import json
import re
from dataclasses import replace

import pytest

from sdxl_worker.generate.infotext import Used, image_seed, infotext, model_name
from sdxl_worker.lora.used import UsedLora
from sdxl_worker.request import Extend, GenerationRequest, LoraScale

REQUEST = GenerationRequest(prompt="a cat", negative_prompt="blur", seed=2**64 - 1, scheduler="DPMSolverMultistep")
LORA = UsedLora("0123456789ab_my: style, v2.safetensors", LoraScale.uniform(0.8), "c" * 10)

# The regular expression of infotext_utils.py in A1111's web UI.
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def settings_of(text: str) -> dict[str, str]:
    return dict(PARAMETER.findall(text.splitlines()[-1]))


def test_the_three_lines():
    text = infotext(REQUEST, 0, "org/some-model", Used([LORA]), model_hash="31e35c80fc")
    prompt, negative, _ = text.splitlines()
    assert prompt == "a cat <lora:my_style_v2:0.8>"
    assert negative == "Negative prompt: blur"
    settings = settings_of(text)
    assert settings["Steps"] == "28"
    assert settings["Sampler"] == "DPM++ 2M"
    assert settings["Schedule type"] == "Automatic"
    assert settings["CFG scale"] == "5.5"
    assert settings["Size"] == "1024x1024"
    assert settings["Model"] == "some-model"
    assert settings["Model hash"] == "31e35c80fc"
    assert json.loads(settings["Lora hashes"]) == f"my_style_v2: {'c' * 10}"


def test_each_picture_has_its_own_seed():
    assert [image_seed(REQUEST, index) for index in (0, 1)] == [2**64 - 1, 0]
    assert settings_of(infotext(REQUEST, 1, "m"))["Seed"] == "0"


def test_no_negative_prompt_and_no_loras():
    text = infotext(GenerationRequest(prompt="猫\nline two"), 0, "tiny")
    assert text.startswith("猫\nline two\nSteps: 28, ")
    assert "Lora hashes" not in text


def test_the_sampler_as_a1111_writes_it():
    request = GenerationRequest("a", scheduler="DPM++ 2M SDE", schedule_type="sgm_uniform", eta=0.5)
    assert (
        infotext(request, 0, "m")
        .splitlines()[1]
        .startswith("Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: SGM Uniform, CFG scale: 5.5, Seed: ")
    )
    assert "Eta" not in infotext(request, 0, "m")
    assert settings_of(infotext(GenerationRequest("a", scheduler="DDIM", eta=0.5), 0, "m"))["Eta DDIM"] == "0.5"
    given = GenerationRequest("a", scheduler="LCM", timesteps=(999, 499), num_inference_steps=2, guidance_rescale=0.7)
    settings = settings_of(infotext(given, 0, "m"))
    assert (settings["Timesteps"], settings["Guidance rescale"]) == ("999 499", "0.7")


def test_what_leaves_calculations_out_is_said_where_it_does():
    settings = settings_of(infotext(GenerationRequest("a", cfg_end=0.6, deep_cache=3), 0, "m"))
    assert (settings["CFG end"], settings["DeepCache interval"]) == ("0.6", "3")
    assert not {"CFG end", "DeepCache interval"} & set(settings_of(infotext(GenerationRequest("a"), 0, "m")))
    assert "CFG end" not in infotext(GenerationRequest("a", cfg_end=0.6, guidance_scale=1), 0, "m")


def test_strength_is_there_for_image_to_image_only():
    request = GenerationRequest(prompt="a", image_url="https://a/b.png", strength=0.4)
    assert settings_of(infotext(request, 0, "tiny"))["Denoising strength"] == "0.4"


def test_what_was_inpainted_is_said_in_a1111_s_words():
    masked = GenerationRequest("a", image="data:,", mask_url="https://a/b.png")
    settings = settings_of(infotext(masked, 0, "tiny"))
    assert (settings["Denoising strength"], settings["Mask blur"]) == ("0.75", "4")
    assert not {"Mask mode", "Inpaint area", "Masked area padding"} & set(settings)
    request = replace(masked, mask_blur=2.5, invert_mask=True, inpaint_full_res=True)
    settings = settings_of(infotext(request, 0, "tiny"))
    assert (settings["Mask blur"], settings["Mask mode"]) == ("2.5", "Inpaint not masked")
    assert (settings["Inpaint area"], settings["Masked area padding"]) == ("Only masked", "32")
    beyond = settings_of(infotext(GenerationRequest("a", image="data:,", extend=Extend(8)), 0, "tiny"))
    assert (beyond["Denoising strength"], beyond["Mask blur"]) == ("0.9", "4")


def test_a_scale_per_part():
    assert UsedLora("x.safetensors", LoraScale(0.8, 0.5, 0.5), "").tag == "<lora:x:0.5:0.8>"


@pytest.mark.parametrize(
    ("model_id", "shown"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0"),
        ("/secret/folder/model.safetensors", "model"),
        ("https://host/models/x.safetensors?token=secret", "x"),
        ("tiny", "tiny"),
    ],
)
def test_model_name_shows_no_folder_and_no_query(model_id, shown):
    assert model_name(model_id) == shown


def test_how_prompts_were_read_is_there_where_it_is_not_the_usual_way():
    usual = settings_of(infotext(GenerationRequest("a", prompt_syntax="a1111"), 0, "tiny"))
    assert not {"Clip skip", "Emphasis"} & set(usual)
    request = GenerationRequest("(a:1.2)", prompt_syntax="a1111", prompt_emphasis="no_norm", clip_skip=3)
    settings = settings_of(infotext(request, 0, "tiny"))
    assert (settings["Clip skip"], settings["Emphasis"]) == ("3", "No norm")
    assert infotext(request, 0, "tiny").startswith("(a:1.2)\n")


def test_hires_has_a1111s_names():
    """As A1111 1.10 writes them; `Size` is that of its first pass too."""
    from sdxl_worker.request.second_pass import Hires

    request = GenerationRequest("a", seed=7, hires=Hires(1.5, 20, 0.45, "lanczos"))
    assert infotext(request, 0, "model").endswith(
        "Size: 1024x1024, Model: model, Denoising strength: 0.45, "
        "Hires upscale: 1.5, Hires steps: 20, Hires upscaler: Lanczos"
    )
    started = GenerationRequest("a", seed=7, hires=Hires(), image_url="https://example.com/a.png", strength=0.3)
    assert infotext(started, 0, "model").endswith(
        "Denoising strength: 0.4, First pass denoising strength: 0.3, "
        "Hires upscale: 2, Hires steps: 28, Hires upscaler: Latent"
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"high_noise_frac": 0.8}, {"Refiner": "sd_xl_refiner_1.0 [7440042bbd]", "Refiner switch at": "0.8"}),
        (
            {"refiner_inference_steps": 50},
            {"Refiner": "sd_xl_refiner_1.0 [7440042bbd]", "Refiner steps": "50", "Refiner strength": "0.3"},
        ),
        ({}, {}),
    ],
)
def test_the_refiner(fields, expected):
    """A1111 writes `Refiner` and `Refiner switch at` (modules/sd_samplers_common.py)."""
    request = GenerationRequest(prompt="a", refiner="sd_xl_refiner_1.0", **fields)
    text = infotext(request, 0, "tiny", Used(refiner="sd_xl_refiner_1.0 [7440042bbd]"))
    assert {name: value for name, value in settings_of(text).items() if "Refiner" in name} == expected
