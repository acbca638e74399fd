"""Every key style leads to the right module: checked by pictures, and against diffusers' own name converter."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sdxl_worker import topology
from sdxl_worker.lora.keys import original_name, sort_keys, split_key, split_module
from sdxl_worker.request import LoraScale
from tests.support.lora_files import picture, save
from tests.support.lora_styles import STYLES, merged_by_hand, styled_file


@pytest.mark.parametrize("style", STYLES)
def test_picture_equals_hand_merged_weights(style: str, pipeline, engine, tmp_path: Path):
    tensors, changes = styled_file(pipeline, style)
    expected, plain = picture(merged_by_hand(pipeline, [(changes, 0.8)])), picture(pipeline)
    (applied,) = engine.apply([(engine.read(save(tmp_path / "lora.safetensors", tensors)), LoraScale.uniform(0.8))])
    assert applied.layers == len(changes)
    assert np.abs(picture(pipeline) - expected).max() <= 1
    assert np.abs(plain - expected).max() > 10


def test_two_loras_add_up_with_a_scale_for_each_part(pipeline, engine, tmp_path: Path):
    first, change = styled_file(pipeline, "diffusers")
    second, other = styled_file(pipeline, "kohya, SDXL names", seed=5)
    text_only = {place: difference for place, difference in other.items() if place[0] == "text_encoder_2"}
    rest = {place: difference for place, difference in other.items() if place[0] == "unet"}
    expected = picture(merged_by_hand(pipeline, [(change, 0.8), (text_only, -0.5), (rest, 0.4)]))
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

    unet = topology.structure(topology.FULL)["unet"]
    parameters = [name.rpartition(".") for name, _ in unet.named_parameters()]
    checkpoint = {
        f"model.diffusion_model.{original_name(module)}.{end}": (module, end) for module, _, end in parameters
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert converted == {f"{module}.{end}": (module, end) for module, _, end in parameters}


def test_every_lora_layer_of_sdxl_is_found():
    from sdxl_worker.lora.keys import ResidentModules

    resident = ResidentModules(topology.structure(topology.FULL))
    names = [name for name in resident.modules["unet"] if re.search(r"attn\d|ff\.net|proj_(in|out)$", name)]
    assert len(names) == 722
    for name in names:
        assert resident.find("unet", name.replace(".", "_")) == name
        assert resident.find("unet", str(original_name(name)).replace(".", "_")) == name


def test_what_is_no_lora_tensor_is_kept_apart():
    keys = sort_keys(["bundle_emb.cat.string_to_param.clip_l", "bundle_emb.cat.string_to_param.clip_g", "a.weight"])
    assert (keys.modules, keys.embeddings, keys.unknown) == ({}, ("cat",), ("a.weight",))
