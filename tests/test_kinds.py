"""The kinds of asset, and what it takes to add one: a single entry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from sdxl_worker import errors
from sdxl_worker.assets import fetch, remote_files
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.sidecar import read_sidecar
from sdxl_worker.assets.sources import hub
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.kinds import CHECKPOINT, LORA, PICTURE
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, settings_for
from tests.support.http_server import FileServer
from tests.support.hub_server import Hub, Repo

CONTENT, OTHER = lora_bytes(1), lora_bytes(2)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    with FileServer() as running:
        yield running


def test_a_kind_is_one_entry(server: FileServer, tmp_path: Path):
    def check(path: Path) -> Mapping[str, Any]:
        if path.read_bytes() != CONTENT:
            raise errors.WrongFile("the file is not an embedding")
        return {"format": "vectors"}

    kind = Kind(
        name="embedding",
        suffixes=(".safetensors", ".pt"),
        sources=("url", "local"),
        folder=lambda settings: settings.lora_cache_dir / "embeddings",
        max_bytes=lambda _: len(CONTENT),
        timeout_s=lambda settings: settings.download_timeout,
        check=check,
        codes={errors.NotFound: "EMBEDDING_NOT_FOUND", errors.WrongFile: "NOT_AN_EMBEDDING"},
    )
    store = AssetStore(settings_for(tmp_path))
    file = store.get(server.add("/a.safetensors", on.whole(CONTENT)), kind)
    assert (file.path.parent, file.path.read_bytes()) == (tmp_path / "embeddings", CONTENT)
    read = read_sidecar(file.path)
    assert read is not None
    assert read[0].format == "vectors"
    assert store.get("a", kind).path == file.path
    failures = {
        "absent": ("EMBEDDING_NOT_FOUND", "the embedding cache holds no file named absent"),
        server.add("/b.safetensors", on.whole(OTHER)): ("NOT_AN_EMBEDDING", "the file is not an embedding"),
        server.add("/c.safetensors", on.whole(CONTENT + b"x")): ("TOO_LARGE", "the file is larger than"),
        "user/repo": ("REFERENCE", "the embedding reference user/repo has no form"),
    }
    for reference, (code, sentence) in failures.items():
        with pytest.raises(errors.WorkerError, match=sentence) as caught:
            store.get(reference, kind)
        assert caught.value.code == code
    with pytest.raises(errors.NotFound) as caught:
        store.get("a", LORA)  # another kind, another folder
    assert caught.value.code == "LORA_NOT_FOUND"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (on.status(404), "INVALID_INPUT"),
        (on.status(403), "INVALID_INPUT"),
        (on.status(418), "FETCH_FAILED"),
        (on.gzip_bomb(1000), "TOO_LARGE"),
        (on.redirect("http://[::1"), "FETCH_FAILED"),
    ],
)
def test_a_picture_has_codes_of_its_own_and_is_kept_nowhere(
    server: FileServer, tmp_path: Path, reply: on.Reply, code: str
):
    store = AssetStore(settings_for(tmp_path / "loras"))
    assert store.read(server.add("/huggingface.co/a/b", on.whole(b"picture")), PICTURE) == b"picture"
    with pytest.raises(errors.FetchError) as caught:
        store.read(server.add("/a.png", reply), PICTURE)
    assert caught.value.code == code
    for reference in ("user/repo", "a.png", "civitai:5@7", "/etc/passwd"):
        with pytest.raises(errors.BadReference) as caught:
            store.read(reference, PICTURE)
        assert caught.value.code == "INVALID_INPUT"
    assert not (tmp_path / "loras").exists()


def test_a_checkpoint_is_fetched_once_wherever_its_branch_moves(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote_files, "RECHECK_S", 0.0)
    monkeypatch.setattr(hub, "RETRY_S", 0.001)
    with FileServer() as cdn:
        stand_in, repo = Hub(server, cdn), Repo({"model.safetensors": CONTENT})
        stand_in.add("user/models", repo)
        settings = settings_for(tmp_path / "loras", hf_endpoint=stand_in.endpoint)
        first = AssetStore(settings).get("user/models/model.safetensors", CHECKPOINT)
        repo.files["model.safetensors"] = OTHER
        asked = len(server.requests)
        again = AssetStore(settings).get("user/models/model.safetensors", CHECKPOINT)
    assert (again.path, again.path.read_bytes(), again.cached) == (first.path, CONTENT, True)
    assert again.path.is_relative_to(tmp_path / "hf" / "checkpoints")
    assert len(server.requests) == asked


def test_a_checkpoint_is_not_read_again_after_a_copy(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = server.add("/model.safetensors", on.whole(CONTENT))
    store = AssetStore(settings_for(tmp_path / "loras"))
    path = store.get(url, CHECKPOINT).path
    shutil.copyfile(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)  # as an image's layers: another time than the sidecar says
    os.utime(path, (1, 1))
    monkeypatch.setattr(remote_files, "file_sha256", lambda _: pytest.fail("read again"))
    unread = replace(CHECKPOINT, check=lambda _: pytest.fail("checked again"))
    assert AssetStore(settings_for(tmp_path / "loras")).get(url, unread).cached
    assert len(server.requests) == 1
