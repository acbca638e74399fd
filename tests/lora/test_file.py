"""What a file says of itself, and values no picture survives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdxl_worker.errors import BadFile, LoraIncompatible
from sdxl_worker.lora.file import check_lora_file
from tests.support.lora_files import CONV, FORMATS, LINEAR, kohya, lora, save, whole_unet

WEIGHT = torch.zeros(8, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("suffix", ["lora_up.weight", "alpha"])
def test_values_that_give_black_pictures_are_refused(value: float, suffix: str, tmp_path: Path):
    tensors, _ = lora(WEIGHT)
    tensors[suffix].view(-1)[-1] = value
    with pytest.raises(BadFile, match="not finite or far too large"):
        check_lora_file(save(tmp_path / "a.safetensors", kohya(LINEAR, tensors)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_float_types_are_checked(dtype: torch.dtype, tmp_path: Path):
    tensors = {name: tensor.to(dtype) for name, tensor in lora(WEIGHT)[0].items()}
    assert check_lora_file(save(tmp_path / "good.safetensors", kohya(LINEAR, tensors))).rank == 4
    tensors["lora_up.weight"] = torch.full((8, 4), float("nan")).to(dtype)
    with pytest.raises(BadFile):
        check_lora_file(save(tmp_path / "bad.safetensors", kohya(LINEAR, tensors)))


@pytest.mark.parametrize("keys", [["model.weight"], ["emb_params"], ["bundle_emb.cat.string_to_param.clip_l"]])
def test_a_file_without_lora_tensors_is_refused_with_the_count(keys: list[str], tmp_path: Path):
    with pytest.raises(LoraIncompatible, match="none of the file's 1 tensors belongs to a LoRA"):
        check_lora_file(save(tmp_path / "a.safetensors", {key: torch.ones(2) for key in keys}))


def test_the_format_is_named(pipeline, tmp_path: Path):
    named = {
        name: check_lora_file(save(tmp_path / "a.safetensors", whole_unet(pipeline.unet, name)[0])).format
        for name in FORMATS
    }
    assert named == {
        "LoRA": "LoRA",
        "LoCon": "LoCon",
        "LoCon Tucker": "LoCon",
        "LoHa": "LoHa",
        "LoHa convolution": "LoHa",
        "LoHa Tucker": "LoHa",
        "LoKr": "LoKr",
        "LoKr convolution": "LoKr",
        "LoKr decomposed": "LoKr",
        "LoKr decomposed convolution": "LoKr",
        "LoKr Tucker": "LoKr",
        "DoRA": "LoRA + DoRA",
        "DoRA convolution": "LoCon + DoRA",
        "DoRA by column": "LoRA + DoRA",
        "full difference": "full difference",
        "norm difference": "norm difference",
        "OFT": "OFT",
        "OFT convolution": "OFT",
        "BOFT": "BOFT",
        "GLoRA": "GLoRA",
    }


def test_metadata_is_told_to_people(tmp_path: Path):
    metadata = {
        "ss_output_name": "my\nstyle\u202e",
        "modelspec.author": "someone",
        "ss_resolution": "(1024, 1024)",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
        "ss_tag_frequency": json.dumps({"10_ohwx cat": {"cat": 30, "sofa": 4}, "5_x": {"cat": 2, "bad": True}}),
        "ss_dataset_dirs": json.dumps({"10_ohwx cat": {"n_repeats": 10}}),
    }
    tensors = kohya(LINEAR, lora(WEIGHT, rank=2, alpha=1.0)[0]) | kohya(CONV, lora(torch.zeros(4, 4, 3, 3), rank=2)[0])
    facts = check_lora_file(save(tmp_path / "a.safetensors", tensors, metadata))
    assert (facts.title, facts.author, facts.resolution) == ("my style", "someone", "(1024, 1024)")
    assert facts.trigger_words == ("ohwx cat",)
    assert facts.top_tags == (("cat", 32), ("sofa", 4))
    assert (facts.base_model, facts.rank, facts.modules, facts.tensors) == ("SDXL", 2, 2, 6)
    assert "format" in facts.as_json()
    assert "embeddings" not in facts.as_json()


@pytest.mark.parametrize("field", ["ss_tag_frequency", "ss_dataset_dirs", "lora_adapter_metadata"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{nope", '{"a": [1]}', '{"unet.r": 1e999, "lora_alpha": "x"}'])
def test_hostile_metadata_is_ignored(field: str, text: str, tmp_path: Path):
    facts = check_lora_file(save(tmp_path / "a.safetensors", kohya(LINEAR, lora(WEIGHT)[0]), {field: text}))
    assert facts.top_tags == ()


def test_long_metadata_is_cut(tmp_path: Path):
    metadata = {"ss_output_name": "x" * 100_000, "ss_dataset_dirs": json.dumps({f"1_{i}": {} for i in range(1000)})}
    facts = check_lora_file(save(tmp_path / "a.safetensors", kohya(LINEAR, lora(WEIGHT)[0]), metadata))
    assert len(facts.title) == 200
    assert len(facts.trigger_words) == 20
