"""Files made to hurt: a sentence that names the module, and no memory, time or base weight is spent on them."""

from __future__ import annotations

import itertools
import json
import re
import string
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdxl_worker.errors import BadFile, LoraIncompatible
from sdxl_worker.lora.file import check_lora_file
from sdxl_worker.request import LoraScale
from tests.support.lora_files import CONV, LINEAR, NORM, Tensors, kohya, lora, modules_for, save, weight_hash
from tests.support.ready_process import ReadyProcess

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
ONE = torch.ones(1)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


MALFORMED: dict[str, tuple[str, Tensors]] = {
    "rank 0": (LINEAR, {UP: zeros(32, 0), DOWN: zeros(0, 32), "alpha": ONE}),
    "empty alpha": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(4, 32), "alpha": zeros(0)}),
    "alpha of two values": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(4, 32), "alpha": zeros(2)}),
    "0-D up": (LINEAR, {UP: zeros(), DOWN: zeros(4, 32), "alpha": ONE}),
    "0-D down": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(), "alpha": ONE}),
    "1-D up": (LINEAR, {UP: zeros(32), DOWN: zeros(4, 32)}),
    "1-D down": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(4)}),
    "both 0-D": (LINEAR, {UP: zeros(), DOWN: zeros()}),
    "0-D core": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(4, 32), MID: zeros()}),
    "1-D core": (CONV, {UP: zeros(16, 4, 1, 1), DOWN: zeros(4, 16, 1, 1), MID: zeros(4)}),
    "core of another rank": (CONV, {UP: zeros(16, 4, 1, 1), DOWN: zeros(4, 16, 1, 1), MID: zeros(4, 3, 3, 3)}),
    "core with an axis more": (CONV, {UP: zeros(16, 4), DOWN: zeros(4, 16), MID: zeros(4, 4, 3, 3, 3)}),
    "LoHa of scalars": (LINEAR, {f"hada_{name}": zeros() for name in ("w1_a", "w1_b", "w2_a", "w2_b")}),
    "LoKr of scalars": (LINEAR, {"lokr_w1": zeros(), "lokr_w2": zeros()}),
    "LoKr with an axis more": (LINEAR, {"lokr_w1": zeros(2, 2, 2), "lokr_w2": zeros(16, 16)}),
    "OFT of five axes": (LINEAR, {"oft_blocks": zeros(1, 1, 8, 4, 4)}),
    "OFT that is not square": (LINEAR, {"oft_blocks": zeros(8, 4, 2)}),
    "BOFT of 1 x 1": (LINEAR, {"oft_blocks": zeros(1, 32, 1, 1)}),
    "GLoRA of scalars": (LINEAR, {f"{name}.weight": zeros() for name in ("a1", "a2", "b1", "b2")}),
    "0-D magnitude": (LINEAR, {UP: zeros(32, 4), DOWN: zeros(4, 32), "dora_scale": zeros()}),
    "magnitude alone": (LINEAR, {"dora_scale": zeros(32, 1)}),
    "DoRA over a norm": (NORM, {"w_norm": zeros(32), "dora_scale": zeros(1, 32)}),
    "0-D difference": (LINEAR, {"diff": zeros()}),
    "wrong bias": (CONV, {"diff_b": zeros(3)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_module_is_named(name: str, engine, pipeline, tmp_path: Path):
    module, tensors = MALFORMED[name]
    before = weight_hash(pipeline)
    path = save(tmp_path / "a.safetensors", kohya(module, tensors))
    with pytest.raises(LoraIncompatible, match="lora_unet_" + module.replace(".", "_")):
        engine.read(path)
    assert weight_hash(pipeline) == before


def test_a_shape_beyond_any_number_is_an_error_of_the_file(engine, tmp_path: Path):
    key = f"lora_unet_{LINEAR.replace('.', '_')}.{DOWN}"
    entry = {"dtype": "F32", "shape": [2**47, 2**47, 0], "data_offsets": [0, 0]}
    header = json.dumps({key: entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    for read in (check_lora_file, engine.read):
        with pytest.raises((LoraIncompatible, BadFile), match=re.escape(key)):
            read(path)


INFLATING = {
    "core": (CONV, {UP: zeros(16, 20000), DOWN: zeros(1, 20000), MID: zeros(20000, 1)}),
    "LoHa core": (
        CONV,
        {
            **{f"hada_t{half}": zeros(1, 200_000, 3, 3) for half in (1, 2)},
            **{f"hada_w{half}_a": zeros(1, 16) for half in (1, 2)},
            **{f"hada_w{half}_b": zeros(200_000, 16) for half in (1, 2)},
        },
    ),
    "GLoRA core": (
        CONV,
        {
            "a1.weight": zeros(16, 1),
            "a2.weight": zeros(1, 16),
            "b1.weight": zeros(16, 20000),
            "b2.weight": zeros(1, 20000),
            "bm.weight": zeros(20000, 1),
        },
    ),
    "outer product": (LINEAR, {UP: zeros(40000, 1), DOWN: zeros(1, 40000)}),
    "Kronecker": (LINEAR, {"lokr_w1": zeros(200, 200), "lokr_w2": zeros(200, 200)}),
}

SETUP = """
import torch
torch.set_num_threads(1)
from sdxl_worker import topology
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.errors import AssetFileError, LoraIncompatible
pipeline = topology.build_sdxl()
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[ReadyProcess]:
    """A process with the tiny model."""
    with ReadyProcess(SETUP) as process:
        yield process


READ = """
engine = LoraEngine(pipeline, 2**30)
before = peak()
try:
    engine.read(Path({path!r}))
except LoraIncompatible as error:
    result = (peak() - before) / 2**20, str(error)
"""


@pytest.mark.parametrize("name", INFLATING)
def test_a_small_file_takes_little_memory(name: str, fresh: ReadyProcess, tmp_path: Path):
    module, tensors = INFLATING[name]
    path = save(tmp_path / "a.safetensors", kohya(module, tensors))
    megabytes, sentence = fresh.result_of(READ.format(path=str(path)))
    assert megabytes < 150
    assert "lora_unet_" + module.replace(".", "_") in sentence


def test_a_rank_beyond_a_small_module_is_fine(engine, pipeline, tmp_path: Path):
    """Trainers write one rank for all modules, `conv_out` with its four outputs included."""
    out, inp = pipeline.unet.conv_out.weight.shape[:2]
    tensors = {UP: zeros(out, 128, 1, 1), MID: zeros(128, 128, 3, 3), DOWN: zeros(128, inp, 1, 1)}
    assert engine.read(save(tmp_path / "a.safetensors", kohya("conv_out", tensors))).facts.rank == 128


def test_memory_that_a_file_asks_for_in_vain_is_the_callers_matter(engine, pipeline, tmp_path: Path, monkeypatch):
    tensors, _ = lora(pipeline.unet.get_submodule(LINEAR).weight)
    parsed = engine.read(save(tmp_path / "a.safetensors", kohya(LINEAR, tensors)))
    before = weight_hash(pipeline)

    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB")

    monkeypatch.setattr(torch, "addmm", full)
    with pytest.raises(LoraIncompatible, match="memory"), engine.applied([(parsed, LoraScale())]):
        pytest.fail("applied")
    monkeypatch.undo()
    assert weight_hash(pipeline) == before


@pytest.mark.parametrize("place", ["engine.read_lora", "trial.build_changes"])
def test_memory_that_runs_out_while_reading_too(place: str, engine, pipeline, tmp_path: Path, monkeypatch):
    def full(*_arguments, **_keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 14000000000 bytes.")

    monkeypatch.setattr(f"sdxl_worker.lora.{place}", full)
    tensors, _ = lora(pipeline.unet.get_submodule(LINEAR).weight)
    with pytest.raises(LoraIncompatible, match="need more memory than this worker has"):
        engine.read(save(tmp_path / "a.safetensors", kohya(LINEAR, tensors)))


def test_one_module_under_two_names_is_refused_with_both(engine, tmp_path: Path):
    ours = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    theirs = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    part = {UP: zeros(32, 4), DOWN: zeros(4, 32)}
    path = save(tmp_path / "a.safetensors", kohya(ours, part) | kohya(theirs, part))
    with pytest.raises(LoraIncompatible, match=f"under two names, 'lora_unet_{ours}' and 'lora_unet_{theirs}'"):
        engine.read(path)


def test_alphas_alone_are_not_a_lora(engine, tmp_path: Path):
    path = save(tmp_path / "a.safetensors", kohya(LINEAR, {"alpha": ONE}) | kohya(CONV, {"alpha": ONE}))
    for read in (check_lora_file, engine.read):
        with pytest.raises(LoraIncompatible, match="2 tensors are alpha values without any weights"):
            read(path)


KEEP = """
engine = LoraEngine(pipeline, 16 * 2**20)
paths = sorted(Path({folder!r}).iterdir())
LoraEngine(pipeline, 0).read(paths[0])
before = resident()
for path in paths:
    engine.read(path)
result = (resident() - before) / 2**20
"""


def megabytes_kept(fresh: ReadyProcess, folder: Path) -> float:
    """What a worker with 16 MB for read LoRAs grows by when it reads every file of `folder`."""
    return fresh.result_of(KEEP.format(folder=str(folder)))


def test_metadata_is_not_kept(fresh: ReadyProcess, tmp_path: Path):
    tensors = kohya(LINEAR, {UP: zeros(32, 4), DOWN: zeros(4, 32)})
    for index in range(30):
        save(tmp_path / f"{index}.safetensors", tensors, {"ss_tag_frequency": "x" * 4_000_000})
    assert megabytes_kept(fresh, tmp_path) < 50


def test_what_is_computed_and_kept_is_counted(pipeline, fresh: ReadyProcess, tmp_path: Path):
    """With its core folded in, a factor of this file is 16 times what the file holds of it."""
    tensors: Tensors = {}
    for module in modules_for(pipeline.unet, CONV)[:10]:
        out, inp = pipeline.unet.get_parameter(f"{module}.weight").shape[:2]
        tensors |= kohya(module, {UP: zeros(out, 900), MID: zeros(900, 1, 3, 3), DOWN: zeros(1, inp)})
    for index in range(25):
        save(tmp_path / f"{index}.safetensors", tensors)
    assert megabytes_kept(fresh, tmp_path) < 50


TIMED = """
engine = LoraEngine(pipeline, 2**30)
before = time.process_time()
try:
    engine.read(Path({path!r}))
except AssetFileError:
    pass
result = time.process_time() - before
"""


def cpu_seconds(fresh: ReadyProcess, path: Path) -> float:
    """The processor time that reading a file takes, whatever else the machine does."""
    return fresh.result_of(TIMED.format(path=str(path)))


def test_a_long_alpha_pattern_takes_no_time(pipeline, fresh: ReadyProcess, tmp_path: Path):
    tensors: Tensors = {}
    for name, module in pipeline.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            out, *rest = module.weight.shape
            tensors |= {f"unet.{name}.lora_A.weight": zeros(1, *rest)}
            tensors |= {f"unet.{name}.lora_B.weight": zeros(out, 1, *[1] * (len(rest) - 1))}
    names = itertools.islice(itertools.product(string.ascii_letters, repeat=4), 420_000)
    settings = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"".join(name): 1 for name in names}}
    text = json.dumps(settings, separators=(",", ":"))
    assert cpu_seconds(fresh, save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})) < 2.5


@pytest.mark.parametrize("name", ["x" * 12_000_000, "_processor" * 1_200_000 + ".alpha"], ids=["x", "module"])
def test_a_long_name_takes_no_time(name: str, fresh: ReadyProcess, tmp_path: Path):
    assert cpu_seconds(fresh, save(tmp_path / "a.safetensors", {name: zeros(1, 1)})) < 0.7
