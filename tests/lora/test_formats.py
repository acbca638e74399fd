"""Each format's change against the published formula, and pictures against weights merged by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

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
    split = {suffix: split_key(f"x.{suffix}") for suffix in tensors}
    return {key[1]: tensors[suffix] for suffix, key in split.items() if key and key[1] != "alpha"}


def change_of(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    return build_changes("x", _roles(tensors), alpha)["weight"].change(weight)


def test_each_format_makes_the_published_change(pipeline):
    for name, (module, make) in FORMATS.items():
        weight = pipeline.unet.get_submodule(module).weight
        tensors, expected = make(weight)
        change = change_of(tensors, weight)
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


def _lycoris(tensors: Tensors, weight: torch.Tensor) -> Any:
    """What LyCORIS' functional API makes of the tensors, None for formats that it lacks."""
    from lycoris import functional
    from lycoris.functional import boft, diag_oft, locon, loha, lokr

    part = tensors.get
    alpha = float(part("alpha", torch.tensor(0.0)))
    if "dora_scale" in tensors:
        inner = _lycoris({name: tensor for name, tensor in tensors.items() if name != "dora_scale"}, weight)
        by_row = tensors["dora_scale"].shape[0] == weight.shape[0]
        return functional.weight_decompose(weight + inner, tensors["dora_scale"], 1, by_row, "torch") - weight
    if "lora_down.weight" in tensors:
        down, up, mid = tensors["lora_down.weight"], tensors["lora_up.weight"], part("lora_mid.weight")
        return locon.diff_weight(down, up, mid, gamma=alpha / down.shape[0], backend="torch")
    if "hada_w1_b" in tensors:
        names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        rank = tensors["hada_w1_b"].shape[0]
        return loha.diff_weight(*map(part, names), gamma=alpha / rank, backend="torch")
    if any(name.startswith("lokr_") for name in tensors):
        ends = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        factor = alpha / tensors["lokr_w2_b"].shape[0] if "lokr_w2_b" in tensors else 1.0
        return lokr.kron_weight(*(part(f"lokr_{end}") for end in ends), scale=factor, backend="torch")
    if "oft_blocks" in tensors:
        module = boft if tensors["oft_blocks"].ndim == 4 else diag_oft
        weights = (tensors["oft_blocks"], part("rescale"))
        return module.diff_weight(weight, *weights, constraint=alpha * weight.shape[0], backend="torch")
    return None


def _mixed(weight: torch.Tensor, name: str) -> Tensors:
    """What else occurs: DoRA over other formats, rotations without bound or rescale."""
    tensors, _ = FORMATS[name][1](weight)
    if "oft_blocks" in tensors:
        return {"oft_blocks": tensors["oft_blocks"], "alpha": torch.tensor(0.0)}
    return tensors | {"dora_scale": 1.0 + lora_files.randn(weight.shape[0], *[1] * (weight.ndim - 1)).abs()}


def test_each_format_that_lycoris_has_makes_the_same_change_there(pipeline):
    lacking = set()
    cases = {
        name: (module, make(pipeline.unet.get_submodule(module).weight)[0]) for name, (module, make) in FORMATS.items()
    }
    for name in ("LoHa", "LoKr", "LoHa Tucker", "LoCon Tucker", "LoKr Tucker", "OFT", "OFT convolution"):
        module = FORMATS[name][0]
        cases[f"{name}, mixed"] = module, _mixed(pipeline.unet.get_submodule(module).weight, name)
    for name, (module, tensors) in cases.items():
        weight = pipeline.unet.get_submodule(module).weight
        expected = _lycoris(tensors, weight)
        if expected is None:
            lacking.add(name)
            continue
        error = (change_of(tensors, weight) - expected.reshape(weight.shape)).norm() / expected.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
    assert lacking == {"full difference", "norm difference", "GLoRA"}


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
