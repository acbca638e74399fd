"""`Model hash`: of the checkpoint's file, or of the file with the UNet."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import save_file

from sdxl_worker.generate.base_model import BaseModel
from sdxl_worker.generate.model_hash import model_hash, start_hashing


def test_a_single_file_has_the_hash_of_the_file(pipeline, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    model = BaseModel("file", tmp_path / "model.safetensors", "model", allow_vae_override=True)
    assert model_hash(model, pipeline) == hashlib.sha256(b"weights").hexdigest()[:10]


def test_hashing_does_not_hold_up_the_first_job_and_an_unreadable_file_has_no_hash(pipeline, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    model = BaseModel("file", tmp_path / "model.safetensors", "model", allow_vae_override=True)
    assert start_hashing(model, pipeline).result(timeout=60) == hashlib.sha256(b"weights").hexdigest()[:10]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert start_hashing(model, pipeline).result(timeout=60) == ""
    assert start_hashing(BaseModel("tiny", None, "tiny", allow_vae_override=False), pipeline).done()


def test_a_file_is_hashed_in_chunks(pipeline, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sdxl_worker.generate.model_hash._CHUNK", 3)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    model = BaseModel("file", tmp_path / "model.safetensors", "model", allow_vae_override=True)
    assert model_hash(model, pipeline) == hashlib.sha256(b"weights").hexdigest()[:10]


def test_whatever_goes_wrong_the_job_that_waits_gets_an_answer():
    tiny = BaseModel("tiny", None, "tiny", allow_vae_override=False)
    assert start_hashing(tiny, None).result(timeout=60) == ""


def test_a_folder_has_the_hash_of_the_unet_that_is_loaded(pipeline, tmp_path: Path):
    model = BaseModel("folder", tmp_path, "model", allow_vae_override=True)
    assert model_hash(model, pipeline) == ""
    (tmp_path / "unet").mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "unet" / name).write_bytes(name.encode())
        assert model_hash(model, pipeline) == hashlib.sha256(name.encode()).hexdigest()[:10]


def test_a_file_of_the_hubs_cache_is_not_read(pipeline, tmp_path: Path):
    blob = tmp_path / "blobs" / ("0123456789" + "a" * 54)
    blob.parent.mkdir()
    blob.write_bytes(b"another content")
    unet = tmp_path / "snapshots" / "c0ffee" / "unet"
    unet.mkdir(parents=True)
    (unet / "diffusion_pytorch_model.fp16.safetensors").symlink_to(blob)
    assert model_hash(BaseModel("folder", unet.parent, "m", allow_vae_override=True), pipeline) == "0123456789"


def test_tiny_has_the_hash_of_its_unet_as_a_file(pipeline, tmp_path: Path):
    save_file(pipeline.unet.state_dict(), tmp_path / "unet.safetensors")
    expected = hashlib.sha256((tmp_path / "unet.safetensors").read_bytes()).hexdigest()[:10]
    assert model_hash(BaseModel("tiny", None, "tiny", allow_vae_override=False), pipeline) == expected
