"""Which names mean a few-step LoRA, and which only sound like one."""

from __future__ import annotations

import pytest

from sdxl_worker.few_step import FEW_STEP, recognised
from sdxl_worker.request import FIELDS

NAMES = {
    "LCM-LoRA": (
        "latent-consistency/lcm-lora-sdxl",
        "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",
        "0123456789ab_latent-consistency_lcm-lora-sdxl.safetensors",
        "LCM_SDXL_LoRA.safetensors",
        "lcm_sdxl",
        "SDXL LCM LoRA",
    ),
    "SDXL-Lightning, 2 steps": ("ByteDance/SDXL-Lightning/sdxl_lightning_2step_lora.safetensors",),
    "SDXL-Lightning, 4 steps": (
        "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors",
        "ByteDance/SDXL-Lightning@c9a24f4/sdxl_lightning_4step_lora.safetensors",
        "https://example.com/files/SDXL%20Lightning%204-step.safetensors",
        "0123456789ab_sdxl_lightning_4step_lora.safetensors",
        "SDXL-Lightning LoRA 4 steps",
        "sd_xl_lightning_4steps",
        "4-step SDXL Lightning",
        "lightning_4step_lora",
    ),
    "SDXL-Lightning, 8 steps": ("ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors",),
    "SDXL-Turbo": ("shiroppo/sd_xl_turbo_lora", "sd_xl_turbo_lora_v1-64dim.safetensors", "SDXL Turbo LoRA"),
    "Hyper-SD, 1 step": ("ByteDance/Hyper-SD/Hyper-SDXL-1step-lora.safetensors",),
    "Hyper-SD, 2 steps": ("ByteDance/Hyper-SD/Hyper-SDXL-2steps-lora.safetensors",),
    "Hyper-SD, 4 steps": ("ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors", "HyperSDXL_4steps"),
    "Hyper-SD, 8 steps": ("ByteDance/Hyper-SD/Hyper-SDXL-8steps-lora.safetensors",),
    "Hyper-SD CFG, 8 steps": (
        "ByteDance/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors",
        "Hyper-SDXL 8 steps LoRA CFG",
    ),
    "Hyper-SD CFG, 12 steps": ("ByteDance/Hyper-SD/Hyper-SDXL-12steps-CFG-lora.safetensors",),
    "TCD-LoRA": ("h1t/TCD-SDXL-LoRA", "0123456789ab_h1t_TCD-SDXL-LoRA.safetensors", "tcd_lora_sdxl"),
    "DMD2": (
        "tianweiy/DMD2/dmd2_sdxl_4step_lora.safetensors",
        "dmd2_sdxl_4step_lora_fp16.safetensors",
        "DMD2 speed lora SDXL & Pony & Illustrious",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_name_is_recognised(kind: str, name: str) -> None:
    row = recognised([name])
    assert row is not None
    assert row.name == kind


def test_every_row_has_a_name_here() -> None:
    assert {row.name for row in FEW_STEP} == set(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "lightning bolts",
        "sdxl_lightning_bolts_style.safetensors",
        "SDXL Lightning Bolts 4 step brush",
        "user/blue-lightning-sdxl/pytorch_lora_weights.safetensors",
        "ink style for SDXL Lightning 4-step",
        "detail slider, SDXL-Lightning 4step compatible",
        "my style, not for LCM LoRA",
        "turbo",
        "porsche-911-turbo-lora",
        "turbocharger_sdxl",
        "hyperrealism_sdxl_v1",
        "Hyper detailed SDXL, 4 steps of blur",
        "hyper_sdxl_portrait",
        "Hyper-SD15-8steps-lora.safetensors",
        "ltcd_sdxl",
        "outfit for DMD2",
        "https://lightning.example.com/sdxl/4step-stairs.safetensors",
        "0123456789ab_pytorch_lora_weights.safetensors",
        "lcm",
        "",
    ],
)
def test_a_false_friend_is_not(name: str) -> None:
    assert recognised([name]) is None


def test_the_first_text_that_names_one_decides() -> None:
    row = recognised(["my-lora", "Hyper-SDXL-8steps-lora", "sdxl_lightning_4step_lora"])
    assert row is not None
    assert row.name == "Hyper-SD, 8 steps"


def test_settings_are_what_a_request_may_ask_for() -> None:
    for row in FEW_STEP:
        for field, value in row.settings.items():
            assert FIELDS[field].check(list(value) if isinstance(value, tuple) else value) is None, (row.name, field)
        assert row.steps[0] <= row.settings["num_inference_steps"] <= row.steps[1]
        assert row.guidance[0] <= row.settings["guidance_scale"] <= row.guidance[1]


def test_a_long_name_takes_no_time() -> None:
    assert recognised(["sdxl lightning " * 100_000]) is None
