"""A start reads and hashes the weights beside its imports, and nothing of that changes what is loaded."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from bench import starts
from sdxl_worker.background import in_background
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate import head_start, model_hash
from sdxl_worker.generate.base_model import BaseModel
from sdxl_worker.generate.head_start import HeadStart, weight_files
from sdxl_worker.memory import collector_paused
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Mode, Worker

# Only bounds a hang.
PATIENCE = 60.0
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(pipeline, tmp_path: Path) -> Path:
    """The tiny model as a folder of diffusers."""
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def worker(model: Path, tmp_path: Path) -> Worker:
    """A worker of that model with a head start, as RunPod starts it."""
    worker = Worker(Settings(model_id=str(model), lora_cache_dir=tmp_path / "loras"), Mode.PRODUCTION)
    worker.resident.head_start = HeadStart(worker.settings)
    return worker


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:10]


def get_ready(worker: Worker) -> None:
    try:
        worker.get_ready()
    finally:
        gc.unfreeze()


def test_files_are_read_in_order_and_one_that_is_not_there_is_passed_over(tmp_path: Path, monkeypatch):
    pipes = [tmp_path / "first", tmp_path / "second"]
    for pipe in pipes:
        os.mkfifo(pipe)
    monkeypatch.setattr(head_start, "weight_files", lambda _: [pipes[0], tmp_path / "none", pipes[1]])
    (tmp_path / "model_index.json").write_text("{}")
    HeadStart(Settings(model_id=str(tmp_path)))

    def write() -> None:
        for pipe in pipes:
            # Opening waits for whoever reads, and closing ends the file for him.
            with pipe.open("wb") as file:
                file.write(bytes(100_000))

    in_background(write, "write").result(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([UNET, "unet/diffusion_pytorch_model.fp16.safetensors"], ["unet/diffusion_pytorch_model.fp16.safetensors"]),
        ([UNET, "text_encoder/model.safetensors", "unet/config.json"], ["text_encoder/model.safetensors", UNET]),
        (["safety_checker/model.safetensors", "sd_xl_base.safetensors", "vae/config.json"], []),
    ],
)
def test_the_weights_that_are_loaded_and_nothing_else(tmp_path: Path, names: list[str], expected: list[str]):
    for name in ["model_index.json", *names]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = weight_files(BaseModel("folder", tmp_path, "model", allow_vae_override=False))
    assert found == [tmp_path / name for name in expected]


def test_the_weights_of_one_file_and_of_none(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    assert weight_files(BaseModel("file", file, "model", allow_vae_override=True)) == [file]
    assert weight_files(BaseModel("tiny", None, "tiny", allow_vae_override=False)) == []


def test_the_model_is_hashed_once(worker, model, monkeypatch, caplog):
    def twice(*_: Any) -> Any:
        pytest.fail("hashed a second time")

    monkeypatch.setattr(model_hash, "start_hashing", twice)
    caplog.set_level("INFO", "sdxl_worker")
    get_ready(worker)
    assert worker.resident.model_hash == hash_of(model / UNET)
    # The line that bench.starts reads.
    found = starts.READY.search(caplog.text)
    assert found
    total, *parts = map(float, found.groups())
    assert abs(total - sum(parts)) < 0.05


def test_a_model_that_could_not_be_loaded_is_hashed_anew(worker, model):
    content = (model / UNET).read_bytes()
    (model / UNET).write_bytes(content[:1000])
    worker.resident.head_start = HeadStart(worker.settings)
    get_ready(worker)
    with pytest.raises(ModelUnavailable, match="not a complete SDXL model"):
        _ = worker.pipeline
    (model / UNET).write_bytes(content)
    assert worker.pipeline.unet is not None
    assert worker.resident.model_hash == hash_of(model / UNET)


def test_another_model_than_the_one_that_was_read_has_its_own_hash(worker, model, tmp_path):
    other = tmp_path / "other"
    for name in ("model_index.json", UNET):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("{}")
    worker.resident.head_start = HeadStart(Settings(model_id=str(other)))
    assert worker.pipeline.unet is not None
    assert worker.resident.model_hash == hash_of(model / UNET)


def test_the_collector_works_again_after_what_it_was_paused_for():
    with contextlib.suppress(KeyError), collector_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
