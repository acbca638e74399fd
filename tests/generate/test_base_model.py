"""Where the base model and the VAE come from, with the real Hub client against a stand-in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from safetensors.numpy import save

from sdxl_worker.assets import fetch
from sdxl_worker.assets.sources import hub
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate import base_model
from sdxl_worker.generate.base_model import (
    BaseModel,
    base_model_here,
    find_base_model,
    find_preview_vae,
    find_refiner,
    find_vae,
    needed_files,
)
from sdxl_worker.settings import Settings
from tests.support import http_server as on
from tests.support.download_files import lora_bytes
from tests.support.http_server import FileServer
from tests.support.hub_server import Hub, Repo

WEIGHTS = save({})
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")
PIPELINE = {
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "unet/config.json": b"{}",
    **{f"{name}/model.fp16.safetensors": WEIGHTS for name in COMPONENTS},
}
VAE = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": WEIGHTS}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hub on loopback, with an empty cache of its client; retries without waiting."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    for module, name in ((base_model, "RETRY_S"), (hub, "RETRY_S"), (fetch, "BACKOFF_S")):
        monkeypatch.setattr(module, name, 0.001)
    with FileServer() as server, FileServer() as cdn:
        yield Hub(server, cdn)


def find(model_id: str, stand_in: Hub | None = None, **options: Any) -> BaseModel:
    settings = Settings(model_id=model_id, hf_endpoint=stand_in.endpoint if stand_in else "http://127.0.0.1:1")
    return find_base_model(settings, **{"runpod_cache": Path("/nonexistent"), **options})


def in_hub_cache(root: Path, repo: str, files: dict[str, bytes], *, refs: bool = True) -> Path:
    """A snapshot in the Hub's cache layout."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "c0ffee"
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    if refs:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c0ffee")
    return snapshot


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


@pytest.mark.parametrize("refs", [True, False])
def test_runpods_cached_model_comes_before_any_download(stand_in: Hub, tmp_path: Path, refs: bool):
    snapshot = in_hub_cache(tmp_path / "volume", "user/model", PIPELINE, refs=refs)
    assert find("user/model", stand_in, runpod_cache=tmp_path / "volume") == BaseModel(
        "folder", snapshot, "user/model", allow_vae_override=True
    )
    assert stand_in.server.requests == []


def test_an_incomplete_cached_model_is_not_taken(stand_in: Hub, tmp_path: Path):
    in_hub_cache(tmp_path / "volume", "user/model", {"model_index.json": b"{}", "unet/model.safetensors": WEIGHTS})
    stand_in.add("user/model", Repo(PIPELINE))
    found = find("user/model", stand_in, runpod_cache=tmp_path / "volume")
    assert found.path is not None
    assert found.path.is_relative_to(tmp_path / "hub")


def test_a_repo_is_downloaded_once_and_only_what_is_needed(stand_in: Hub):
    unneeded = {"sd_xl_base_1.0.safetensors": WEIGHTS, "unet/model.safetensors": WEIGHTS, "vae/model.msgpack": b"x"}
    stand_in.add("user/model", Repo({**PIPELINE, **unneeded}))
    found = find("user/model", stand_in)
    assert found.path is not None
    assert sorted(str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()) == sorted(
        PIPELINE
    )
    stand_in.server.requests.clear()
    assert find("user/model", stand_in) == found
    assert stand_in.server.requests == []


def test_downloads_are_retried(stand_in: Hub, monkeypatch: pytest.MonkeyPatch):
    stand_in.add("user/model", Repo(PIPELINE))
    stand_in.down = True
    monkeypatch.setattr(base_model.time, "sleep", lambda _: setattr(stand_in, "down", False))
    assert find("user/model", stand_in).kind == "folder"


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


def test_offline_says_what_to_run(stand_in: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="download_weights"):
        find("user/model", stand_in)


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


def test_the_vae(stand_in: Hub, tmp_path: Path):
    extra = {"sdxl_vae.safetensors": WEIGHTS, "README.md": b""}
    stand_in.add("user/vae", Repo({**VAE, **extra}))
    settings = Settings(vae_id="user/vae", hf_endpoint=stand_in.endpoint)
    path = find_vae(settings, runpod_cache=tmp_path / "volume")
    assert path is not None
    assert sorted(file.name for file in path.iterdir()) == sorted(VAE)
    assert find_vae(Settings(vae_id="")) is None
    shutil.copytree(path, tmp_path / "vae")
    assert find_vae(Settings(vae_id=str(tmp_path / "vae"))) == tmp_path / "vae"
    for vae_id in ("user/absent", "no-such-folder", "user/vae/absent.safetensors", str(tmp_path / "absent.ckpt")):
        with pytest.raises(ModelUnavailable, match="VAE_ID"):
            find_vae(Settings(vae_id=vae_id, hf_endpoint=stand_in.endpoint), runpod_cache=tmp_path)


def test_the_vae_of_previews_is_found_as_the_vae_is(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/taesdxl", Repo(VAE))
    settings = Settings(preview_vae_id="user/taesdxl", hf_endpoint=stand_in.endpoint)
    path = find_preview_vae(settings, runpod_cache=tmp_path / "volume")
    assert path is not None
    assert sorted(file.name for file in path.iterdir()) == sorted(VAE)
    assert find_preview_vae(Settings()) is None
    for preview_vae_id in ("user/absent", "no-such-folder"):
        settings = Settings(preview_vae_id=preview_vae_id, hf_endpoint=stand_in.endpoint)
        with pytest.raises(ModelUnavailable, match="PREVIEW_VAE_ID"):
            find_preview_vae(settings, runpod_cache=tmp_path)


def test_a_vae_in_one_file(stand_in: Hub, tmp_path: Path):
    content = lora_bytes()
    stand_in.add("user/vaes", Repo({"mine.safetensors": content}))
    url = stand_in.cdn.add("/vae.safetensors", on.whole(content))
    for vae_id in ("user/vaes/mine.safetensors", url):
        found = find_vae(Settings(vae_id=vae_id, hf_endpoint=stand_in.endpoint), runpod_cache=tmp_path)
        assert found is not None
        assert found.is_relative_to(tmp_path / "checkpoints")
        assert found.read_bytes() == content
        assert find_vae(Settings(vae_id=str(found))) == found
    page = stand_in.cdn.add("/page.safetensors", on.whole(b"<html>"))
    with pytest.raises(ModelUnavailable, match=r"VAE_ID .*VAE"):
        find_vae(Settings(vae_id=page, hf_endpoint=stand_in.endpoint), runpod_cache=tmp_path)


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
