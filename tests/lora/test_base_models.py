"""The base model is told from names and shapes first, and from metadata second."""

from __future__ import annotations

import pytest

from sdxl_worker.lora.base_models import detect_base_model
from sdxl_worker.lora.keys import sort_keys

ATTENTION = "down_blocks_2_attentions_0_transformer_blocks_0_attn2_to_k"
CASES = {
    "SDXL, kohya": ("SDXL", {f"lora_unet_{ATTENTION}.lora_down.weight": (8, 2048)}),
    "SDXL, diffusers": ("SDXL", {f"unet.{ATTENTION.replace('_', '.')}.lora_A.weight": (8, 2048)}),
    "SDXL, LoKr": ("SDXL", {f"lora_unet_{ATTENTION}.lokr_w1": (4, 8), f"lora_unet_{ATTENTION}.lokr_w2": (320, 256)}),
    "SDXL, by depth": (
        "SDXL",
        {"lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.lora_down.weight": (8, 1280)},
    ),
    "SDXL, second encoder": ("SDXL", {"lora_te2_text_model_encoder_layers_3_mlp_fc1.lora_down.weight": (8, 1280)}),
    "SD 1.5, kohya": ("Stable Diffusion 1.5", {f"lora_unet_{ATTENTION}.lora_down.weight": (8, 768)}),
    "SD 1.5, first level": (
        "Stable Diffusion 1.5",
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (8, 320)},
    ),
    "SD 1.5, text encoder only": (
        "Stable Diffusion 1.5",
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (8, 768)},
    ),
    "SD 2, kohya": ("Stable Diffusion 2", {f"lora_unet_{ATTENTION}.lora_down.weight": (8, 1024)}),
    "SD 2, text encoder only": (
        "Stable Diffusion 2",
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (8, 1024)},
    ),
    "SDXL refiner": ("the SDXL refiner", {f"lora_unet_{ATTENTION}.lora_down.weight": (8, 1280)}),
    "Flux, diffusers": ("Flux", {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (8, 3072)}),
    "Flux, kohya": ("Flux", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (8, 3072)}),
    "Flux, ComfyUI": ("Flux", {"diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight": (8, 3072)}),
    "SD3, diffusers": (
        "Stable Diffusion 3",
        {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (8, 1536)},
    ),
    "SD3, kohya": ("Stable Diffusion 3", {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (8, 1536)}),
    "Wan": ("Wan", {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": (8, 5120)}),
    "half SDXL, half Flux": (
        "Flux",
        {
            f"lora_unet_{ATTENTION}.lora_down.weight": (8, 2048),
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (8, 3072),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_tell(name: str):
    expected, shapes = CASES[name]
    # Metadata that says otherwise changes nothing.
    assert detect_base_model(sort_keys(shapes), shapes, {"ss_base_model_version": "sd3m"}) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1.5"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({}, "unknown"),
    ],
)
def test_metadata_tells_where_names_and_shapes_do_not(metadata: dict[str, str], expected: str):
    shapes = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (8, 768)}
    assert detect_base_model(sort_keys(shapes), shapes, metadata) == expected
