"""The base model is told from names and shapes first, and from metadata second; names as real files have them."""

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
    "SD3, kohya, another width": (
        "Stable Diffusion 3",
        {"lora_unet_transformer_blocks_3_attn_to_q.lora_down.weight": (8, 2432)},
    ),
    "Flux, XLabs": (
        "Flux",
        {
            "double_blocks.0.processor.proj_lora1.down.weight": (16, 3072),
            "double_blocks.0.processor.qkv_lora1.down.weight": (16, 3072),
            "double_blocks.0.processor.qkv_lora1.up.weight": (9216, 16),
        },
    ),
    "Flux, double blocks only": (
        "Flux",
        {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (16, 3072),
            "transformer.transformer_blocks.0.ff_context.net.0.proj.lora_A.weight": (16, 3072),
        },
    ),
    "Anima, kohya": (
        "Anima or Cosmos-Predict2",
        {
            "lora_unet_blocks_0_cross_attn_k_proj.lora_down.weight": (8, 1024),
            "lora_unet_blocks_0_mlp_layer1.lora_down.weight": (8, 2048),
            "lora_te_layers_0_self_attn_q_proj.lora_down.weight": (8, 1024),
        },
    ),
    "Anima, the text encoder first": (
        "Anima or Cosmos-Predict2",
        {
            "lora_te_layers_0_self_attn_q_proj.lora_down.weight": (8, 1024),
            "lora_unet_llm_adapter_blocks_0_cross_attn_q_proj.lora_down.weight": (8, 1024),
        },
    ),
    "Anima, PEFT": (
        "Anima or Cosmos-Predict2",
        {
            "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight": (8, 2048),
            "diffusion_model.blocks.0.cross_attn.v_proj.lora_A.weight": (8, 2048),
        },
    ),
    "Anima, LoKr": ("Anima or Cosmos-Predict2", {"diffusion_model.blocks.0.cross_attn.k_proj.lokr_w1": (2048, 8)}),
    "Krea 2, kohya": (
        "Krea 2",
        {
            "lora_unet_blocks_0_attn_wk.lora_down.weight": (32, 6144),
            "lora_unet_txtfusion_layerwise_blocks_0_attn_wq.lora_down.weight": (32, 2560),
        },
    ),
    "Krea 2, PEFT": ("Krea 2", {"base_model.model.blocks.0.mlp.gate.lora_A.weight": (32, 6144)}),
    "Krea 2, diffusers": (
        "Krea 2",
        {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (32, 6144),
            "transformer.transformer_blocks.0.ff.gate.lora_A.weight": (32, 6144),
        },
    ),
    "Krea 2, diffusers, attention only": (
        "Krea 2",
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight": (32, 6144)},
    ),
    "Qwen-Image, diffusers": (
        "Qwen-Image",
        {
            "transformer_blocks.0.attn.add_k_proj.lora_A.default.weight": (16, 3072),
            "transformer_blocks.0.img_mlp.net.2.lora_A.default.weight": (16, 12288),
        },
    ),
    "Qwen-Image, diffusers, attention only": (
        "Qwen-Image",
        {
            "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (64, 3072),
            "transformer.transformer_blocks.59.attn.to_k.lora_A.weight": (64, 3072),
        },
    ),
    "Qwen-Image, attention of the first blocks": (
        "Qwen-Image or Flux",
        {"transformer_blocks.0.attn.to_k.lora_down.weight": (64, 3072)},
    ),
    "Qwen-Image, kohya": (
        "Qwen-Image",
        {
            "lora_unet_transformer_blocks_0_attn_add_k_proj.lora_down.weight": (16, 3072),
            "lora_unet_transformer_blocks_0_txt_mlp_net_2.lora_down.weight": (16, 12288),
        },
    ),
    "Z-Image, attention only": (
        "Lumina or Z-Image",
        {"diffusion_model.layers.0.attention.to_q.lora_A.weight": (16, 3840)},
    ),
    "Wan, diffusers": ("Wan", {"transformer.blocks.0.attn1.to_q.lora_A.weight": (16, 5120)}),
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
