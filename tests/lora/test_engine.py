"""Apply, restore, exactness, memory, and the cache of parsed files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.errors import AssetFileError, RestoreFailed
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.formats.format import tensors_of
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.request import LoraScale
from tests.support.lora_files import FORMATS, LINEAR, kohya, lora, picture, save, weight_hash, whole_unet


@pytest.fixture
def files(pipeline, tmp_path: Path) -> list[Path]:
    """A LoRA and a LoKr for many modules of the UNet."""
    names = ("LoRA", "LoKr")
    return [save(tmp_path / f"{name}.safetensors", whole_unet(pipeline.unet, name)[0]) for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_is_bit_exact(dtype: torch.dtype, tmp_path: Path):
    pipeline = topology.build_sdxl(dtype=dtype)
    engine = LoraEngine(pipeline, 2**30)
    before = weight_hash(pipeline)
    for name in FORMATS:
        parsed = engine.read(save(tmp_path / f"{name}.safetensors", whole_unet(pipeline.unet, name)[0]))
        engine.apply([(parsed, LoraScale.uniform(0.9)), (parsed, LoraScale.uniform(-0.3))])
        assert weight_hash(pipeline) != before, name
        engine.restore()
        assert weight_hash(pipeline) == before, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path):
    pipeline = topology.build_sdxl(dtype=dtype)
    weight = pipeline.unet.get_submodule(LINEAR).weight
    tensors, change = lora(weight)
    expected = (weight.double() + (0.6 + 0.7 - 0.2) * change).to(dtype)
    engine = LoraEngine(pipeline, 2**30)
    parsed = engine.read(save(tmp_path / "a.safetensors", kohya(LINEAR, tensors)))
    engine.apply([(parsed, LoraScale.uniform(scale)) for scale in (0.6, 0.7, -0.2)])
    # A value on the boundary between two roundings may fall to either side; three roundings would move far more.
    differing = (weight != expected).float().mean()
    assert differing < 0.01


def test_storage_stays_in_place(pipeline, engine, files):
    addresses = {name: value.data_ptr() for name, value in pipeline.unet.named_parameters()}
    engine.apply([(engine.read(path), LoraScale()) for path in files])
    assert {name: value.data_ptr() for name, value in pipeline.unet.named_parameters()} == addresses
    engine.restore()
    assert {name: value.data_ptr() for name, value in pipeline.unet.named_parameters()} == addresses


def test_the_same_lora_twice_adds_up(pipeline, engine, files):
    parsed = engine.read(files[0])
    engine.apply([(parsed, LoraScale.uniform(0.3)), (parsed, LoraScale.uniform(0.5))])
    twice = picture(pipeline)
    engine.apply([(parsed, LoraScale.uniform(0.8))])
    assert np.abs(twice - picture(pipeline)).max() <= 1


def test_scale_zero_changes_no_bit(pipeline, engine, files):
    before = weight_hash(pipeline)
    (applied,) = engine.apply([(engine.read(files[0]), LoraScale.uniform(0.0))])
    assert applied.layers == 0
    assert weight_hash(pipeline) == before


def test_asking_again_gives_the_same_bits(pipeline, engine, files):
    loras = [(engine.read(path), LoraScale.uniform(0.7)) for path in files]
    engine.apply(loras)
    first = weight_hash(pipeline)
    engine.apply(loras)
    assert weight_hash(pipeline) == first


def test_a_failure_half_way_leaves_the_base_model(pipeline, engine, files, monkeypatch):
    before, parsed = weight_hash(pipeline), engine.read(files[1])
    calls = iter(range(100))
    original = type(next(iter(parsed.matched.changes.values()))).change

    def fail_at_tenth(self, weight):
        if next(calls) == 10:
            raise RuntimeError("a bug, say")
        return original(self, weight)

    monkeypatch.setattr("sdxl_worker.lora.formats.kronecker.Kronecker.change", fail_at_tenth)
    with pytest.raises(RuntimeError, match="say"):
        engine.apply([(engine.read(files[0]), LoraScale()), (parsed, LoraScale())])
    assert weight_hash(pipeline) == before


def test_a_bad_second_lora_leaves_the_base_model(pipeline, engine, files, tmp_path: Path):
    plain, before = picture(pipeline), weight_hash(pipeline)
    (tmp_path / "bad.safetensors").write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(AssetFileError):
        engine.apply([(engine.read(path), LoraScale()) for path in (files[0], tmp_path / "bad.safetensors")])
    assert weight_hash(pipeline) == before
    assert np.array_equal(picture(pipeline), plain)


def test_a_failed_restore_asks_for_a_fresh_worker(pipeline, engine, files, monkeypatch):
    engine.apply([(engine.read(files[0]), LoraScale())])

    def broken(*_args, **_keywords):
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", broken)
        with pytest.raises(RestoreFailed) as caught:
            engine.restore()
    assert caught.value.as_answer()["refresh_worker"] is True
    engine.restore()


def test_a_hundred_alternations_leave_the_bits_alone(pipeline, engine, files):
    loras = [(engine.read(path), LoraScale.uniform(0.8)) for path in files]
    plain, before = picture(pipeline), weight_hash(pipeline)
    for _ in range(100):
        with engine.applied(loras):
            pass
    assert weight_hash(pipeline) == before
    assert np.array_equal(picture(pipeline), plain)


ALTERNATE = """
import gc, os, sys
from pathlib import Path
from sdxl_worker import topology
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.formats.format import tensors_of
from sdxl_worker.request import LoraScale

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

engine = LoraEngine(topology.build_sdxl(), 2**30)
loras = [(engine.read(Path(path)), LoraScale()) for path in sys.argv[1:]]

def alternate(times):
    for _ in range(times):
        with engine.applied(loras):
            pass

alternate(5)
before = resident()
alternate(100)
print(resident() - before)
"""


def test_a_hundred_alternations_leave_the_memory_alone(files):
    """One set of the weights that the two change takes 1 MB, a hundred of them 100."""
    done = subprocess.run([sys.executable, "-c", ALTERNATE, *files], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16


def test_a_repeat_reads_no_file(pipeline, files, monkeypatch):
    engine = LoraEngine(pipeline, 2**30)
    first = engine.read(files[0])
    monkeypatch.setattr("sdxl_worker.lora.engine.read_lora", None)
    assert engine.read(files[0]) is first


def test_a_replaced_file_is_read_again(pipeline, files):
    engine = LoraEngine(pipeline, 2**30)
    first = engine.read(files[0])
    os.replace(files[1], files[0])
    second = engine.read(files[0])
    assert (first.facts.format, second.facts.format) == ("LoRA", "LoKr")


def test_the_least_recently_used_goes_first(pipeline, files, tmp_path: Path, monkeypatch):
    small = save(tmp_path / "small.safetensors", kohya(LINEAR, lora(torch.zeros(32, 32))[0]))
    probe = LoraEngine(pipeline, 2**30)
    sizes = [probe.read(path).size for path in (*files, small)]
    engine = LoraEngine(pipeline, sizes[0] + sizes[1] + sizes[2] - 1)
    first = engine.read(files[0])
    second = engine.read(files[1])
    assert engine.read(files[0]) is first
    engine.read(small)
    assert engine.read(files[0]) is first
    assert engine.read(files[1]) is not second


def test_page_locked_memory_counts_as_what_torch_takes(pipeline, files, monkeypatch):
    """In powers of two: a file of 1.1 GB takes 2."""
    plain = LoraEngine(pipeline, 2**30).read(files[0])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _self: True)
    pinned = LoraEngine(pipeline, 2**30).read(files[0])
    taken = next(2**bits for bits in range(40) if 2**bits >= plain.data.numel())
    assert taken > plain.data.numel()
    assert pinned.size - plain.size == taken - plain.data.numel()


def test_no_ram_cache(pipeline, files):
    engine = LoraEngine(pipeline, 0)
    assert engine.read(files[0]) is not engine.read(files[0])


@pytest.mark.parametrize("name", FORMATS)
def test_changes_on_another_device_are_the_same(name: str, pipeline, engine, tmp_path: Path):
    """One copy of the whole buffer, cut up again: on the CPU a second buffer stands in for the GPU's."""
    parsed = engine.read(save(tmp_path / "a.safetensors", whole_unet(pipeline.unet, name)[0]))
    assert parsed.data_on(torch.device("cpu")) is parsed.data
    copy = parsed.data.clone()
    moved = parsed.changes_in(copy)
    assert copy.data_ptr() in {t.untyped_storage().data_ptr() for t in tensors_of(next(iter(moved.values())))}
    first = next(iter(moved))
    assert list(parsed.changes_in(copy, [first])) == [first]
    assert moved.keys() == parsed.matched.changes.keys()
    for target, change in parsed.matched.changes.items():
        weight = pipeline.unet.get_parameter(f"{target.module}.{target.parameter}")
        assert torch.allclose(moved[target].change(weight), change.change(weight), atol=1e-6)


def test_low_rank_files_take_the_fused_path(pipeline, engine, files):
    """The format most people use must not fall back to the general sum."""
    assert all(isinstance(change, LowRank) for change in engine.read(files[0]).matched.changes.values())


def test_changing_loras_recompiles_nothing(files):
    from torch._dynamo.testing import CompileCounter

    pipeline = topology.build_sdxl()
    pipeline.set_progress_bar_config(disable=True)
    eager = picture(pipeline)
    counter = CompileCounter()
    pipeline.unet = torch.compile(pipeline.unet, backend=counter)
    engine = LoraEngine(pipeline, 2**30)
    plain = picture(pipeline)
    assert np.abs(plain - eager).max() <= 1
    compiled = counter.frame_count
    assert compiled >= 1
    for path in files:
        engine.apply([(engine.read(path), LoraScale())])
        assert np.abs(picture(pipeline) - plain).max() > 3
        engine.restore()
    assert np.array_equal(picture(pipeline), plain)
    assert counter.frame_count == compiled
