"""Weights of every format against its formula in float64, and their bits after many switches; CPU and GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sdxl_worker import topology
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.formats.format import map_tensors
from sdxl_worker.lora.merge import WeightMerger
from sdxl_worker.request import LoraScale
from tests.support import lora_files
from tests.support.lora_files import FORMATS, save, whole_unet
from tests.support.operations import Waits

# float32 keeps 24 bits: what adding up some hundred values of this size leaves of them, with room.
FLOAT32_SUMS = 5e-6
SWITCHES = {"cpu": 12, "cuda": 100}
# Those that hold nothing but plain numbers: rounded beforehand, they are the same in the file and in the formula.
HALF_FILES = ("LoRA", "LoCon", "LoCon Tucker", "LoHa", "LoKr", "LoKr decomposed")


class Resident(NamedTuple):
    """A tiny SDXL in float16, its engine, and its UNet in host memory as it was."""

    pipeline: Any
    engine: LoraEngine
    host: torch.nn.Module

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.pipeline.unet.state_dict().items()}

    def has(self, before: dict[str, Tensor]) -> bool:
        now = self.pipeline.unet.state_dict()
        return all(torch.equal(now[name], value) for name, value in before.items())


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def resident(request: pytest.FixtureRequest) -> Resident:
    return build(request.param)


def build(device: str) -> Resident:
    pipeline = topology.build_sdxl(dtype=torch.float16, device=device)
    pipeline.unet.requires_grad_(False)
    return Resident(pipeline, LoraEngine(pipeline, 2**30), copy.deepcopy(pipeline.unet).cpu())


def assert_rounded_once(resident: Resident, changes: dict[str, Tensor], scale: float) -> None:
    """Each weight is the float16 next to pristine + scale * change, or the other one where float32 cannot tell."""
    for module, change in changes.items():
        expected = resident.host.get_parameter(f"{module}.weight").double() + scale * change
        merged = resident.pipeline.unet.get_parameter(f"{module}.weight").cpu().double()
        # Half the distance between two float16 at this value, of which the least ones are 2**-24 apart.
        half_a_step = (torch.finfo(torch.float16).eps * expected.abs()).clamp_min(2.0**-24) / 2
        size = max(1.0, float(expected.abs().max()))
        worst = ((merged - expected).abs() - half_a_step).max()
        assert worst <= FLOAT32_SUMS * size, f"{module}: {float(worst):.1e} beyond one rounding"


@pytest.mark.parametrize("name", FORMATS)
def test_merged_weights_are_the_formula_rounded_once(name: str, resident: Resident, tmp_path: Path) -> None:
    before = resident.weights()
    tensors, changes = whole_unet(resident.host, name)
    loras = [(resident.engine.read(save(tmp_path / "a.safetensors", tensors)), LoraScale.uniform(0.7))]
    with resident.engine.sent_ahead(loras), resident.engine.applied(loras):
        assert not resident.has(before)
        assert_rounded_once(resident, changes, 0.7)
    assert resident.has(before)


@pytest.mark.parametrize("name", HALF_FILES)
def test_so_are_those_of_files_in_float16(name: str, resident: Resident, tmp_path: Path, monkeypatch) -> None:
    exact = lora_files.randn
    monkeypatch.setattr(lora_files, "randn", lambda *shape, seed=0: exact(*shape, seed=seed).half().float())
    tensors, changes = whole_unet(resident.host, name)
    halved = {key: tensor if key.endswith("alpha") else tensor.half() for key, tensor in tensors.items()}
    loras = [(resident.engine.read(save(tmp_path / "a.safetensors", halved)), LoraScale.uniform(-1.3))]
    with resident.engine.applied(loras):
        assert_rounded_once(resident, changes, -1.3)


def test_two_of_one_format_are_summed_before_they_are_rounded(resident: Resident, tmp_path: Path) -> None:
    tensors, changes = whole_unet(resident.host, "LoRA")
    parsed = resident.engine.read(save(tmp_path / "a.safetensors", tensors))
    with resident.engine.applied([(parsed, LoraScale.uniform(0.9)), (parsed, LoraScale.uniform(-0.6))]):
        assert_rounded_once(resident, changes, 0.9 - 0.6)


def switch(resident: Resident, folder: Path, times: int) -> None:
    """One to four LoRAs of any format for another, sometimes without putting back in between; then all is as before."""
    before, random = resident.weights(), Random(0)
    parsed = [
        resident.engine.read(save(folder / f"{name}.safetensors", whole_unet(resident.host, name)[0]))
        for name in FORMATS
    ]
    for index in range(times):
        chosen = random.sample(parsed, random.randint(1, 4))
        loras = [(lora, LoraScale.uniform(random.choice((-0.5, 0.3, 1.0)))) for lora in chosen]
        with resident.engine.sent_ahead(loras):
            resident.engine.apply(loras)
        if index % 3:
            resident.engine.restore()
            assert resident.has(before)
    resident.engine.restore()
    assert resident.has(before)


def test_many_switches_leave_the_bits_alone(resident: Resident, tmp_path: Path) -> None:
    switch(resident, tmp_path, SWITCHES[resident.pipeline.device.type])


@pytest.mark.gpu
def test_nor_do_they_change_with_pristine_weights_in_page_locked_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(WeightMerger, "_choose_place", lambda *_: "host")
    resident = build("cuda")
    switch(resident, tmp_path, 30)
    tensors, changes = whole_unet(resident.host, "LoRA")
    with resident.engine.applied([(resident.engine.read(save(tmp_path / "a.safetensors", tensors)), LoraScale())]):
        assert_rounded_once(resident, changes, 1.0)


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_waits_for_the_device(name: str, pipeline, engine, tmp_path: Path) -> None:
    """The meta device stands in for the GPU."""
    parsed = engine.read(save(tmp_path / "a.safetensors", whole_unet(pipeline.unet, name)[0]))
    target, change = next(iter(parsed.matched.changes.items()))
    on_meta = map_tensors(change, lambda tensor: tensor.to("meta"))
    weight = pipeline.unet.get_parameter(f"{target.module}.weight").to("meta")
    with Waits() as waits:
        on_meta.change(weight)
    assert waits.names == []
