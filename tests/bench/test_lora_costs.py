"""bench.lora_costs on the tiny model: every part gives whole figures, and the weights keep their bits."""

from __future__ import annotations

import argparse

import pytest
import torch

from bench.convolutions import convolutions_on
from bench.lora_costs import formats_on, layers_on, ranks_on, switches_on
from bench.lora_files import WRITERS, linear_layers, write_file
from bench.memory_limit import MemoryLimit
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import LoraScale
from tests.support.lora_files import weight_hash

# TINY: 10 in each of the UNet's 2 + 4 + 2 + 6 + 3 transformer blocks, 2 around each of its 11 stacks of them, and 6 in
# each of the text encoders' 2 + 2 layers.
LAYERS = 216


def figures(found: dict) -> None:
    assert found["bits_kept"] is True
    for case in found["cases"].values():
        for name in ("apply_s", "restore_s", "sent_ahead_apply_s", "limit_s", "limit_ratio", "against_first"):
            assert 0 < case[name]["min"] <= case[name]["median"] <= case[name]["max"]


def test_every_part_gives_whole_figures_and_leaves_the_weights_alone(pipeline):
    before = weight_hash(pipeline)
    options = argparse.Namespace(repeats=2, ranks=(4, 8), counts=(1, 2), shares=(0.5, 1.0), convolution=(16, 8, 3, 3))
    by_rank, by_format, by_layers = (part(pipeline, options) for part in (ranks_on, formats_on, layers_on))
    for found in (by_rank, by_format, by_layers):
        figures(found)
    assert list(by_rank["cases"]) == ["4", "8"]
    assert by_rank["cases"]["8"]["files_bytes"] > by_rank["cases"]["4"]["files_bytes"]
    assert list(by_format["cases"]) == ["LoRA", "LoHa", "LoKr", "DoRA", "OFT"]
    assert by_format["cases"]["LoRA"]["against_first"]["median"] == 1
    assert [(point["loras"], point["share"], point["modules"]) for point in by_layers["points"]] == [
        (1, 0.5, LAYERS // 2),
        (1, 1.0, LAYERS),
        (2, 0.5, LAYERS // 2),
        (2, 1.0, LAYERS),
    ]
    assert by_layers["cases"].keys() == {"1 x 50%", "1 x 100%", "2 x 50%", "2 x 100%"}
    assert convolutions_on(pipeline, options)["ratio"]["min"] > 0
    assert weight_hash(pipeline) == before


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_of_their_format_and_change_every_layer_a_little(name, pipeline, engine, tmp_path):
    parsed = engine.read(write_file(pipeline, tmp_path / "a.safetensors", name=name))
    assert parsed.facts.format.removeprefix("LoRA + ") == name
    layers = dict(linear_layers(pipeline))
    before = {key: layer.weight.clone() for key, layer in layers.items()}
    with engine.applied([(parsed, LoraScale.uniform(1.0))]) as (applied,):
        assert applied.layers == len(layers)
        for key, layer in layers.items():
            assert 1e-4 < (layer.weight - before[key]).norm() / before[key].norm() < 1.0, key


def test_the_limit_counts_what_is_read_and_written_and_sees_a_changed_bit():
    weights = [torch.ones(4, 4), torch.ones(2, dtype=torch.float16)]
    limit = MemoryLimit(weights)
    # Read and written, twice.
    assert limit.moved_bytes == 4 * (64 + 4)
    assert limit.bits_are_kept()
    weights[1][0] = 2
    assert not limit.bits_are_kept()
    limit.copy_twice()
    assert limit.bits_are_kept()


def test_weights_that_do_not_come_back_show(pipeline, engine, tmp_path, monkeypatch):
    path = write_file(pipeline, tmp_path / "a.safetensors", share=0.1)
    monkeypatch.setattr(LoraEngine, "restore", lambda self: None)
    layers = [layer.weight for _, layer in linear_layers(pipeline)]
    before = [weight.clone() for weight in layers]
    try:
        assert switches_on(pipeline, {"1": [path]}, 1)["bits_kept"] is False
    finally:
        with torch.no_grad():
            torch._foreach_copy_(layers, before)
