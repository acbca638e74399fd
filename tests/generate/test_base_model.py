"""Where the base model and the refiner come from, with the real Hub client against a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.base_model import BaseModel, base_model_here, find_base_model, find_refiner
from sdxl_worker.settings import Settings
from tests.support import http_server as on
from tests.support.download_files import lora_bytes
from tests.support.hub_server import Hub, Repo
from tests.support.model_repos import PIPELINE, WEIGHTS, in_hub_cache


def find(model_id: str, stand_in: Hub | None = None, **options: Any) -> BaseModel:
    settings = Settings(model_id=model_id, hf_endpoint=stand_in.endpoint if stand_in else "http://127.0.0.1:1")
    return find_base_model(settings, **{"runpod_cache": Path("/nonexistent"), **options})


def test_tiny_and_local_models(tmp_path: Path):
    assert find("tiny") == BaseModel("tiny", None, "tiny", allow_vae_override=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    folder, file = find(str(tmp_path / "model")), find(str(tmp_path / "model.safetensors"))
    assert folder == BaseModel("folder", tmp_path / "model", "model", allow_vae_override=False)
    assert file == BaseModel("file", tmp_path / "model.safetensors", "model.safetensors", allow_vae_override=True)


def test_what_is_here_is_found_without_a_network_and_what_is_not_is_none(tmp_path: Path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    in_hub_cache(cache, "user/model", PIPELINE)

    def here(model_id: str) -> BaseModel | None:
        return base_model_here(Settings(model_id=model_id, hf_endpoint="http://127.0.0.1:1"), runpod_cache=cache)

    assert here(str(model)) is None
    (model / "model_index.json").write_text("{}")
    assert here(str(model)) == find(str(model))
    assert here("user/model") == find("user/model", runpod_cache=cache)
    for model_id in ("tiny", "user/other", "https://127.0.0.1:1/a.safetensors", "civitai:1@2", "", "a b"):
        assert here(model_id) is None


def test_a_local_folder_takes_the_vae_only_when_it_was_set(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    for environment, expected in (({}, False), ({"VAE_ID": Settings.vae_id}, True), ({"VAE_ID": ""}, False)):
        settings = Settings.from_environment({"MODEL_ID": str(tmp_path), **environment})
        assert find_base_model(settings).allow_vae_override is expected


@pytest.mark.parametrize(
    ("model_id", "says"),
    [
        ("user/absent", "MODEL_ID"),
        ("user/gated", "HF_TOKEN"),
        ("user/no-model", "MODEL_ID"),
        ("no-such-folder", "MODEL_ID"),
        ("/no/such/folder", "MODEL_ID"),
        ("ftp://host/model.safetensors", "MODEL_ID"),
        ("http://127.0.0.1:1/model.safetensors", "MODEL_ID"),
    ],
)
def test_a_missing_model_is_one_sentence(stand_in: Hub, model_id: str, says: str):
    stand_in.add("user/gated", Repo(PIPELINE, gated=True))
    stand_in.add("user/no-model", Repo({"README.md": b""}))
    with pytest.raises(ModelUnavailable, match=says) as caught:
        find(model_id, stand_in)
    assert "\n" not in str(caught.value)


def test_local_folders_and_files_that_are_not_a_model(tmp_path: Path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    for model_id in (tmp_path, tmp_path / "model.ckpt"):
        with pytest.raises(ModelUnavailable):
            find(str(model_id))


def test_a_checkpoint_url_is_stored_under_a_hashed_name(stand_in: Hub, tmp_path: Path):
    content = lora_bytes()
    url = stand_in.cdn.add("/model.safetensors", on.cut(content, 100, etag='"v"'), on.whole(content, etag='"v"'))
    found = find(f"{url}?token=SECRET", stand_in)
    assert found.path is not None
    assert (found.kind, found.path.read_bytes(), found.path.parent) == ("file", content, tmp_path / "checkpoints")
    assert "SECRET" not in str(found)
    asked = len(stand_in.cdn.requests)
    assert find(f"{url}?token=SECRET", stand_in) == found
    assert len(stand_in.cdn.requests) == asked


def test_a_checkpoint_in_a_repo(stand_in: Hub):
    stand_in.add("user/models", Repo({"model.safetensors": lora_bytes()}))
    for model_id in ("user/models/model.safetensors", "https://huggingface.co/user/models/blob/main/model.safetensors"):
        assert find(model_id, stand_in).kind == "file"


def test_a_checkpoint_url_that_gives_something_else(stand_in: Hub, tmp_path: Path):
    for content in (b"<html>", b"", lora_bytes()[:-1], json.dumps({}).encode()):
        url = stand_in.cdn.add("/model.safetensors", on.whole(content))
        with pytest.raises(ModelUnavailable, match="checkpoint"):
            find(url, stand_in)
    assert not [*(tmp_path / "checkpoints").glob("*.safetensors*"), *(tmp_path / "checkpoints" / ".partial").iterdir()]


def test_the_refiner_is_found_as_a_base_model_is(stand_in: Hub, tmp_path: Path):
    """Of a repo its UNet and scheduler are fetched: text encoder and VAE are the base model's."""
    stand_in.add("user/refiner", Repo(PIPELINE))
    settings = Settings(refiner_id="user/refiner", hf_endpoint=stand_in.endpoint)
    found = find_refiner(settings, runpod_cache=tmp_path / "volume")
    assert found is not None
    assert found.path is not None
    assert (found.kind, found.name) == ("folder", "user/refiner")
    files = {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()}
    expected = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/model.fp16.safetensors",
    }
    assert files == expected
    asked = len(stand_in.server.requests)
    assert find_refiner(settings, runpod_cache=tmp_path / "volume") == found
    assert len(stand_in.server.requests) == asked
    assert find_refiner(Settings(refiner_id=str(found.path))) == BaseModel(
        "folder", found.path, found.path.name, allow_vae_override=False
    )
    (tmp_path / "refiner.safetensors").write_bytes(WEIGHTS)
    file = find_refiner(Settings(refiner_id=str(tmp_path / "refiner.safetensors")))
    assert file is not None
    assert file.kind == "file"
    assert find_refiner(Settings()) is None
    for refiner_id in ("user/absent", "no-such-folder", "ftp://host/a.safetensors", str(tmp_path)):
        with pytest.raises(ModelUnavailable, match="REFINER_ID"):
            find_refiner(Settings(refiner_id=refiner_id, hf_endpoint=stand_in.endpoint), runpod_cache=tmp_path)
