"""PEFT's scaling in a file's metadata; expectations are PEFT's rules, written out."""

from __future__ import annotations

import json

import pytest

from sdxl_worker.lora.peft import peft_scaling


def scaling(component: str, **settings: object):
    return peft_scaling({"lora_adapter_metadata": json.dumps(settings)}).get(component)


PATTERN = {"attn1.to_q": 1, "mid_block.attentions.0.proj_in": 2, "to_q": 3, "text_model.encoder.layers.0.mlp.fc1": 5}


@pytest.mark.parametrize(
    ("alias", "alpha"),
    [
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 1),  # the first that ends the name
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", 3),
        ("mid_block_attentions_0_proj_in", 2),
        ("encoder_layers_0_mlp_fc1", 5),  # today's transformers leave `text_model` out
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_into_q", 8),  # no part of a name
        ("conv_in", 8),
    ],
)
def test_a_pattern_is_for_the_modules_whose_names_it_ends(alias: str, alpha: float):
    found = scaling("unet", **{"unet.lora_alpha": 8, "unet.alpha_pattern": PATTERN})
    assert found.alpha_of(alias, rank=4) == alpha


def test_rank_stabilised_scaling_is_by_the_root_of_the_rank():
    """PEFT: alpha / sqrt(r); what is divided by the rank later must be alpha * sqrt(r)."""
    found = scaling("", lora_alpha=8, use_rslora=True, alpha_pattern={"to_q": 2})
    assert (found.alpha_of("conv_in", rank=16), found.alpha_of("x_to_q", rank=16)) == (32, 8)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"lora_alpha": "8"}', '{"lora_alpha": 1e300}', '{"lora_alpha": true}', '{"r": 4}']
)
def test_what_is_malformed_is_left_out(text: str):
    assert peft_scaling({"lora_adapter_metadata": text}) == {}


def test_a_pattern_longer_than_any_model_is_left_out():
    found = scaling("", lora_alpha=8, alpha_pattern={f"m{index}": 1 for index in range(30_001)})
    assert found.alpha_of("m7", rank=4) == 8
