"""A file that does not fit is refused by name and count, before a weight is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sdxl_worker.errors import LoraIncompatible
from tests.support.lora_files import LINEAR, kohya, lora, save, weight_hash, whole_unet

FLUX = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture
def good(pipeline):
    return kohya(LINEAR, lora(pipeline.unet.get_submodule(LINEAR).weight)[0])


def _refused(engine, pipeline, path: Path, message: str) -> None:
    before = weight_hash(pipeline)
    with pytest.raises(LoraIncompatible, match=message) as caught:
        engine.read(path)
    assert str(path.parent) not in str(caught.value)
    assert weight_hash(pipeline) == before


def test_another_base_model_is_named(engine, pipeline, good, tmp_path: Path):
    flux = {f"{FLUX}.lora_down.weight": torch.ones(2, 8), f"{FLUX}.lora_up.weight": torch.ones(8, 2)}
    message = "this LoRA is for Flux; this worker runs SDXL"
    _refused(engine, pipeline, save(tmp_path / "flux.safetensors", flux), message)
    _refused(engine, pipeline, save(tmp_path / "half.safetensors", good | flux), message)


def test_names_without_a_known_end_are_told_too(engine, pipeline, tmp_path: Path):
    """XLabs' Flux LoRAs write `qkv_lora1.down`, ComfyUI's for Krea 2 leave `.weight` out."""
    xlabs = {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(2, 8)}
    _refused(engine, pipeline, save(tmp_path / "a.safetensors", xlabs), "this LoRA is for Flux")
    krea = {"diffusion_model.blocks.0.attn.wq.lora_A": torch.ones(2, 8)}
    _refused(engine, pipeline, save(tmp_path / "b.safetensors", krea), "this LoRA is for Krea 2")
    checkpoint = {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 8)}
    _refused(engine, pipeline, save(tmp_path / "c.safetensors", checkpoint), "it may be a checkpoint")


def test_a_text_encoder_that_sd15_shares_needs_a_word_of_sdxl(engine, pipeline, tmp_path: Path):
    module = "encoder.layers.0.self_attn.q_proj"
    tensors, _ = lora(pipeline.text_encoder.get_submodule(module).weight)
    names = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
    keys = {f"text_encoder.text_model.{module}.{new}": tensors[old] for old, new in names.items()}
    _refused(
        engine,
        pipeline,
        save(tmp_path / "a.safetensors", keys),
        "text encoder that Stable Diffusion 1.5 and SDXL share",
    )
    said = save(tmp_path / "b.safetensors", keys, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    assert engine.read(said).facts.base_model == "SDXL"


def test_modules_that_match_nothing_are_counted(engine, pipeline, good, tmp_path: Path):
    stranger = {key.replace("down_blocks_1", "down_blocks_7"): tensor for key, tensor in good.items()}
    _refused(
        engine,
        pipeline,
        save(tmp_path / "a.safetensors", good | stranger),
        "only 1 of 2 modules match SDXL; 'lora_unet_down_blocks_7",
    )
    _refused(engine, pipeline, save(tmp_path / "b.safetensors", stranger), "only 0 of 1 modules match SDXL")


def test_modules_that_a_variant_lacks_are_a_warning(engine, pipeline, good, tmp_path: Path):
    lacking = {key.replace("transformer_blocks_0", "transformer_blocks_1"): tensor for key, tensor in good.items()}
    parsed = engine.read(save(tmp_path / "a.safetensors", good | lacking))
    assert parsed.warnings == ("1 of 2 modules are not in this variant of SDXL",)
    _refused(engine, pipeline, save(tmp_path / "b.safetensors", lacking), "only 0 of 1 modules match")


def test_unknown_tensors_are_refused(engine, pipeline, good, tmp_path: Path):
    path = save(tmp_path / "a.safetensors", good | {"something.else": torch.ones(1)})
    _refused(engine, pipeline, path, "1 of 4 tensors have names this worker does not know, such as 'something.else'")


def test_a_bundled_embedding_for_one_text_encoder_is_named(engine, good, tmp_path: Path):
    bundle = {"bundle_emb.cat.string_to_param.clip_l": torch.ones(1, 16)}
    parsed = engine.read(save(tmp_path / "a.safetensors", good | bundle))
    assert parsed.warnings == (
        "the bundled embedding 'cat' is not applied: this embedding has vectors for one text encoder, 16 numbers wide; "
        "one for SDXL has two, 768 and 1280",
    )
    assert parsed.facts.embeddings == ("cat",)


def test_a_thousand_bundled_embeddings_are_bounded(engine, good, tmp_path: Path):
    bundle = {f"bundle_emb.e{index}.clip_l": torch.ones(1, 16) for index in range(1000)}
    bundle |= {f"bundle_emb.e{index}.clip_g": torch.ones(1, 24) for index in range(1000)}
    parsed = engine.read(save(tmp_path / "a.safetensors", good | bundle))
    assert len(parsed.bundled.embeddings) == 64
    assert parsed.warnings == ("936 of 1000 bundled embeddings are not applied",)


@pytest.mark.parametrize("suffix", ["lora_up.weight", "lora_down.weight"])
def test_a_misfitting_tensor_is_named(suffix: str, engine, pipeline, good, tmp_path: Path):
    name = next(key for key in good if key.endswith(suffix))
    for shape in (
        (3, 3),
        (good[name].shape[0] + 1, good[name].shape[1]),
        (good[name].shape[0], good[name].shape[1] + 1),
    ):
        path = save(tmp_path / f"{shape}.safetensors", good | {name: torch.ones(shape)})
        _refused(
            engine, pipeline, path, re.escape("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q")
        )


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "OFT", "GLoRA", "DoRA", "full difference"])
def test_a_file_for_wider_modules_is_refused(name: str, engine, pipeline, tmp_path: Path):
    from sdxl_worker import topology

    wide = topology.SdxlSize(**{**vars(topology.TINY), "unet_channels": (32, 64, 64)})
    with torch.random.fork_rng():
        unet = topology.build_sdxl(wide).unet
    path = save(tmp_path / "a.safetensors", whole_unet(unet, name)[0])
    _refused(engine, pipeline, path, "do not fit the resident weight of shape")


def test_a_bias_that_is_not_there_is_refused(engine, pipeline, good, tmp_path: Path):
    key = next(iter(good)).rpartition(".lora")[0]
    path = save(tmp_path / "a.safetensors", good | {f"{key}.diff_b": torch.ones(32)})
    _refused(engine, pipeline, path, "changes a bias that the module does not have")


@pytest.mark.parametrize(
    "settings",
    [
        '{"unet.kasa_config": {}, "unet.lora_alpha": 4}',
        '{"modules_to_save": ["conv_in"], "trainable_token_indices": [1, 2]}',
        '{"r": 1000000000, "lora_alpha": 1e300, "use_dora": true}',
    ],
)
def test_peft_settings_beyond_alpha_change_nothing(settings: str, engine, pipeline, good, tmp_path: Path):
    before = weight_hash(pipeline)
    parsed = engine.read(save(tmp_path / "a.safetensors", good, {"lora_adapter_metadata": settings}))
    plain = engine.read(save(tmp_path / "b.safetensors", good))
    changes = [next(iter(lora.matched.changes.values())).change(torch.zeros(32, 32)) for lora in (parsed, plain)]
    assert torch.allclose(changes[0], changes[1], atol=1e-6)
    assert weight_hash(pipeline) == before
