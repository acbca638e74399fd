"""Each format's change against the published formula, and pictures against weights merged by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_worker.errors import LoraIncompatible
from sdxl_worker.lora.formats import build_changes
from sdxl_worker.lora.keys import split_key
from sdxl_worker.request import LoraScale
from tests.support import lora_files
from tests.support.lora_files import FORMATS, LINEAR, Tensors, kohya, picture, save


def _roles(tensors: Tensors) -> Tensors:
    return {roles[1]: tensor for suffix, tensor in tensors.items() if (roles := split_key(f"x.{suffix}"))}


def test_each_format_makes_the_published_change(pipeline):
    for name, (module, make) in FORMATS.items():
        weight = pipeline.unet.get_submodule(module).weight
        tensors, expected = make(weight)
        roles = _roles(tensors)
        change = build_changes("x", roles)["weight"].change(weight)
        assert change.dtype == torch.float32
        error = (change - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_picture_equals_hand_merged_weights(name: str, scale: float, pipeline, engine, tmp_path: Path):
    tensors, changes = lora_files.whole_unet(pipeline.unet, name)
    plain = picture(pipeline)
    by_hand = copy.deepcopy(pipeline)
    with torch.no_grad():
        for module, change in changes.items():
            by_hand.unet.get_submodule(module).weight.add_(scale * change)
    expected = picture(by_hand)

    parsed = engine.read(save(tmp_path / "lora.safetensors", tensors))
    applied = engine.apply([(parsed, LoraScale.uniform(scale))])
    actual = picture(pipeline)
    engine.restore()

    assert applied[0].layers == len(changes)
    assert np.abs(actual - expected).max() <= 1
    assert np.abs(plain - expected).max() > 3, "the test's LoRA is too weak to prove anything"
    assert np.array_equal(picture(pipeline), plain)


def test_bias_and_weight_change_together(pipeline, engine, tmp_path: Path):
    module = pipeline.unet.get_submodule(lora_files.CONV)
    tensors = {"diff": lora_files.randn(*module.weight.shape), "diff_b": lora_files.randn(*module.bias.shape)}
    before = module.weight.clone(), module.bias.clone()
    parsed = engine.read(save(tmp_path / "lora.safetensors", kohya(lora_files.CONV, tensors)))
    engine.apply([(parsed, LoraScale.uniform(0.5))])
    assert torch.allclose(module.weight, before[0] + 0.5 * tensors["diff"], atol=1e-7)
    assert torch.allclose(module.bias, before[1] + 0.5 * tensors["diff_b"], atol=1e-7)


def test_rank_stabilised_and_plain_peft_alpha(pipeline, engine, tmp_path: Path):
    weight = pipeline.unet.get_submodule(LINEAR).weight
    tensors, change = lora_files.lora(weight, rank=4, alpha=4.0)
    names = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
    keys = {f"unet.{LINEAR}.{names[suffix]}": tensor for suffix, tensor in tensors.items() if suffix in names}
    for settings, factor in (
        ('{"unet.lora_alpha": 8, "unet.r": 4}', 2.0),
        ('{"lora_alpha": 8, "use_rslora": true}', 4.0),
    ):
        path = save(tmp_path / f"{factor}.safetensors", keys, {"lora_adapter_metadata": settings})
        original = weight.clone()
        engine.apply([(engine.read(path), LoraScale())])
        assert torch.allclose(weight, original + factor * change.float(), atol=1e-6)
        engine.restore()


@pytest.mark.parametrize("missing", ["lora_up.weight", "lora_down.weight"])
def test_half_of_a_pair_is_named(missing: str, pipeline):
    tensors, _ = lora_files.lora(pipeline.unet.get_submodule(LINEAR).weight)
    roles = _roles({suffix: tensor for suffix, tensor in tensors.items() if suffix != missing})
    with pytest.raises(LoraIncompatible, match=r"'(up|down)' of the LoRA module 'some\.module' is missing"):
        build_changes("some.module", roles)


def test_tensors_that_do_not_go_together_are_refused():
    roles = {"diff": torch.zeros(2, 2), "hada_w2_a": torch.zeros(2, 2)}
    with pytest.raises(LoraIncompatible, match="do not go together"):
        build_changes("x", roles)
