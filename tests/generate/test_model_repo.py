"""A repo that is cached, downloaded, or neither, with the real Hub client against a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate import model_repo
from sdxl_worker.generate.base_model import BaseModel, find_base_model
from sdxl_worker.generate.model_repo import needed_files
from sdxl_worker.settings import Settings
from tests.support.hub_server import Hub, Repo
from tests.support.model_repos import PIPELINE, WEIGHTS, in_hub_cache


def find(stand_in: Hub, **options: Any) -> BaseModel:
    settings = Settings(model_id="user/model", hf_endpoint=stand_in.endpoint)
    return find_base_model(settings, **{"runpod_cache": Path("/nonexistent"), **options})


@pytest.mark.parametrize("refs", [True, False])
def test_runpods_cached_model_comes_before_any_download(stand_in: Hub, tmp_path: Path, refs: bool):
    snapshot = in_hub_cache(tmp_path / "volume", "user/model", PIPELINE, refs=refs)
    assert find(stand_in, runpod_cache=tmp_path / "volume") == BaseModel(
        "folder", snapshot, "user/model", allow_vae_override=True
    )
    assert stand_in.server.requests == []


def test_an_incomplete_cached_model_is_not_taken(stand_in: Hub, tmp_path: Path):
    in_hub_cache(tmp_path / "volume", "user/model", {"model_index.json": b"{}", "unet/model.safetensors": WEIGHTS})
    stand_in.add("user/model", Repo(PIPELINE))
    found = find(stand_in, runpod_cache=tmp_path / "volume")
    assert found.path is not None
    assert found.path.is_relative_to(tmp_path / "hub")


def test_a_repo_is_downloaded_once_and_only_what_is_needed(stand_in: Hub):
    unneeded = {"sd_xl_base_1.0.safetensors": WEIGHTS, "unet/model.safetensors": WEIGHTS, "vae/model.msgpack": b"x"}
    stand_in.add("user/model", Repo({**PIPELINE, **unneeded}))
    found = find(stand_in)
    assert found.path is not None
    assert sorted(str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()) == sorted(
        PIPELINE
    )
    stand_in.server.requests.clear()
    assert find(stand_in) == found
    assert stand_in.server.requests == []


def test_downloads_are_retried(stand_in: Hub, monkeypatch: pytest.MonkeyPatch):
    stand_in.add("user/model", Repo(PIPELINE))
    stand_in.down = True
    monkeypatch.setattr(model_repo.time, "sleep", lambda _: setattr(stand_in, "down", False))
    assert find(stand_in).kind == "folder"


def test_offline_says_what_to_run(stand_in: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="download_weights"):
        find(stand_in)


def test_one_set_of_weights_per_component():
    names = [
        "model_index.json",
        "README.md",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.onnx",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "unet/openvino_model.bin",
        "vae/flax_model.msgpack",
    ]
    assert needed_files(names) == [
        "model_index.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
