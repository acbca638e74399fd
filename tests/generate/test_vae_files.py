"""Where the VAE and that of the previews come from, with the real Hub client against a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.vae_files import find_preview_vae, find_vae
from sdxl_worker.settings import Settings
from tests.support import http_server as on
from tests.support.download_files import lora_bytes
from tests.support.hub_server import Hub, Repo
from tests.support.model_repos import VAE, WEIGHTS


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
