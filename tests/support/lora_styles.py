"""The key styles trainers write, each over the same modules of the UNet and both text encoders."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch

from tests.support.lora_files import Tensors, lora

UNET_MODULES = {
    # diffusers name: SDXL's own name, as kohya's sd-scripts writes them.
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k": "input_blocks_8_1_transformer_blocks_1_attn2_to_k",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "middle_block_1_transformer_blocks_1_ff_net_0_proj",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_out.0": (
        "output_blocks_2_1_transformer_blocks_1_attn1_to_out_0"
    ),
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v": "output_blocks_3_1_transformer_blocks_0_attn1_to_v",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "time_embedding.linear_1": "time_embed_0",
    "conv_out": "out_2",
}
TEXT_MODULES = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")


def _kohya_diffusers(component: str, module: str) -> str:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{module.replace('.', '_')}"


def _kohya_original(component: str, module: str) -> str:
    return f"lora_unet_{UNET_MODULES[module]}" if component == "unet" else _kohya_diffusers(component, module)


def _dotted(component: str, module: str) -> str:
    return f"{component}.{module}"


def _attention_processor(component: str, module: str) -> str:
    """Before PEFT, diffusers put attention LoRAs on the attention processor: `attn1.processor.to_q_lora`."""
    if ".attn" not in module:
        return f"{component}.{module}.lora"
    processor = re.sub(r"(attn[12])[.](to_[a-z]+)([.]0)?$", r"\1.processor.\2_lora", module)
    return f"{component}.{processor}"


def _comfy(component: str, module: str) -> str:
    prefix = {"unet": "diffusion_model", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
    return f"{prefix}.{module}"


KOHYA = ("lora_up.weight", "lora_down.weight", "alpha")
# style -> (module as written, suffixes for up, down, alpha); alpha None = not written, so alpha = rank.
STYLES: dict[str, tuple[Callable[[str, str], str], tuple[str, str, str | None]]] = {
    "kohya, diffusers names": (_kohya_diffusers, KOHYA),
    "kohya, SDXL names": (_kohya_original, KOHYA),
    "diffusers": (_dotted, ("lora_B.weight", "lora_A.weight", None)),
    "diffusers, lora.up": (_dotted, ("lora.up.weight", "lora.down.weight", None)),
    "diffusers, lora_linear_layer": (_dotted, ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight", None)),
    "diffusers, attention processors": (_attention_processor, ("up.weight", "down.weight", None)),
    "PEFT": (lambda c, m: f"base_model.model.{c}.{m}", ("lora_B.default.weight", "lora_A.default.weight", None)),
    "ComfyUI": (_comfy, KOHYA),
}


def layers_of(pipeline) -> dict[tuple[str, str], torch.nn.Module]:
    """The modules a styled file changes, by (component, name as diffusers and trainers write it)."""
    layers = {("unet", name): pipeline.unet.get_submodule(name) for name in UNET_MODULES}
    for name in TEXT_MODULES:
        layers["text_encoder", name] = pipeline.text_encoder.get_submodule(name.removeprefix("text_model."))
        layers["text_encoder_2", name] = pipeline.text_encoder_2.get_submodule(name)
    return layers


def styled_file(pipeline, style: str, seed: int = 0) -> tuple[Tensors, dict[tuple[str, str], torch.Tensor]]:
    """A file in the given style (rank 4), and the change that each (component, module) should see at scale 1."""
    write, (up, down, alpha) = STYLES[style]
    tensors: Tensors = {}
    changes = {}
    for (component, name), layer in layers_of(pipeline).items():
        part, changes[component, name] = lora(
            layer.get_parameter("weight"), rank=4, alpha=4.0 if alpha is None else 2.0, seed=seed
        )
        key = write(component, name)
        tensors |= {f"{key}.{up}": part["lora_up.weight"], f"{key}.{down}": part["lora_down.weight"]}
        if alpha:
            tensors[f"{key}.{alpha}"] = part["alpha"]
    return tensors, changes


def merged_by_hand(pipeline, changes: list[tuple[dict[tuple[str, str], torch.Tensor], float]]):
    """A copy of the pipeline with `scale * change` added to the weights of each (component, module)."""
    merged = copy.deepcopy(pipeline)
    layers = layers_of(merged)
    with torch.no_grad():
        for change, scale in changes:
            for place, difference in change.items():
                layers[place].get_parameter("weight").add_(scale * difference)
    return merged
