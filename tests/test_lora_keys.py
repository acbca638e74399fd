"""Every key style leads to the right module: checked by pictures, and against diffusers' own name converter."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_worker import tiny
from sdxl_worker.lora_keys import original_name, sort_keys, split_key, split_module
from sdxl_worker.request import LoraScale
from tests.support.lora_files import Tensors, lora, picture, save

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


def _layers(pipeline) -> dict[tuple[str, str], torch.nn.Module]:
    layers = {("unet", name): pipeline.unet.get_submodule(name) for name in UNET_MODULES}
    for name in TEXT_MODULES:
        layers["text_encoder", name] = pipeline.text_encoder.get_submodule(name.removeprefix("text_model."))
        layers["text_encoder_2", name] = pipeline.text_encoder_2.get_submodule(name)
    return layers


def _file(pipeline, style: str, seed: int = 0) -> tuple[Tensors, dict[tuple[str, str], torch.Tensor]]:
    write, (up, down, alpha) = STYLES[style]
    tensors: Tensors = {}
    changes = {}
    for (component, name), layer in _layers(pipeline).items():
        part, changes[component, name] = lora(
            layer.get_parameter("weight"), rank=4, alpha=4.0 if alpha is None else 2.0, seed=seed
        )
        key = write(component, name)
        tensors |= {f"{key}.{up}": part["lora_up.weight"], f"{key}.{down}": part["lora_down.weight"]}
        if alpha:
            tensors[f"{key}.{alpha}"] = part["alpha"]
    return tensors, changes


def _by_hand(pipeline, changes: list[tuple[dict[tuple[str, str], torch.Tensor], float]]) -> np.ndarray:
    merged = copy.deepcopy(pipeline)
    layers = _layers(merged)
    with torch.no_grad():
        for change, scale in changes:
            for place, difference in change.items():
                layers[place].get_parameter("weight").add_(scale * difference)
    return picture(merged)


@pytest.mark.parametrize("style", STYLES)
def test_picture_equals_hand_merged_weights(style: str, pipeline, engine, tmp_path: Path):
    tensors, changes = _file(pipeline, style)
    expected, plain = _by_hand(pipeline, [(changes, 0.8)]), picture(pipeline)
    (applied,) = engine.apply([(engine.read(save(tmp_path / "lora.safetensors", tensors)), LoraScale.uniform(0.8))])
    assert applied.layers == len(changes)
    assert np.abs(picture(pipeline) - expected).max() <= 1
    assert np.abs(plain - expected).max() > 10


def test_two_loras_add_up_with_a_scale_for_each_part(pipeline, engine, tmp_path: Path):
    first, change = _file(pipeline, "diffusers")
    second, other = _file(pipeline, "kohya, SDXL names", seed=5)
    text_only = {place: difference for place, difference in other.items() if place[0] == "text_encoder_2"}
    rest = {place: difference for place, difference in other.items() if place[0] == "unet"}
    expected = _by_hand(pipeline, [(change, 0.8), (text_only, -0.5), (rest, 0.4)])
    parsed = [engine.read(save(tmp_path / f"{n}.safetensors", t)) for n, t in (("a", first), ("b", second))]
    engine.apply([(parsed[0], LoraScale.uniform(0.8)), (parsed[1], LoraScale(0.4, 0.0, -0.5))])
    assert np.abs(picture(pipeline) - expected).max() <= 1


def test_attention_processor_names():
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    assert split_key(f"{module}.down.weight") == (module.removesuffix("_lora"), "down")
    assert split_module(module.removesuffix("_lora")) == (
        "unet",
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out",
    )


def test_original_names_agree_with_diffusers_converter():
    """diffusers converts SDXL checkpoints to its own names: each of ours must come back as its module."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = tiny.structure(tiny.FULL)["unet"]
    parameters = [name.rpartition(".") for name, _ in unet.named_parameters()]
    checkpoint = {
        f"model.diffusion_model.{original_name(module)}.{end}": (module, end) for module, _, end in parameters
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert converted == {f"{module}.{end}": (module, end) for module, _, end in parameters}


def test_every_lora_layer_of_sdxl_is_found():
    from sdxl_worker.lora_keys import ResidentModules

    resident = ResidentModules(tiny.structure(tiny.FULL))
    names = [name for name in resident.modules["unet"] if re.search(r"attn\d|ff\.net|proj_(in|out)$", name)]
    assert len(names) == 722
    for name in names:
        assert resident.find("unet", name.replace(".", "_")) == name
        assert resident.find("unet", str(original_name(name)).replace(".", "_")) == name


def test_what_is_no_lora_tensor_is_kept_apart():
    keys = sort_keys(["bundle_emb.cat.string_to_param.clip_l", "bundle_emb.cat.string_to_param.clip_g", "a.weight"])
    assert (keys.modules, keys.embeddings, keys.unknown) == ({}, ("cat",), ("a.weight",))
