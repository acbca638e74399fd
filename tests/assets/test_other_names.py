"""Other names of cached files, and files found by the readable part of their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdxl_worker.assets.cache import Cache
from sdxl_worker.assets.eviction import evict
from sdxl_worker.assets.sidecar import sidecar_path
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import Ambiguous, BadReference, CacheWriteError, NotFound
from sdxl_worker.kinds import LORA
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, published, settings_for
from tests.support.http_server import FileServer

FIRST, SECOND = lora_bytes(1), lora_bytes(2)


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    return AssetStore(settings_for(tmp_path / "loras"))


def fetch(store: AssetStore, server: FileServer, path: str, content: bytes):
    return store.get(server.add(path, on.whole(content)), LORA)


def test_a_name_leads_to_the_file_and_moves_with_the_request(store: AssetStore, server: FileServer):
    first, second = fetch(store, server, "/a.safetensors", FIRST), fetch(store, server, "/b.safetensors", SECOND)
    assert store.keep_as(first, "My LoRA!.safetensors", LORA) == "My_LoRA"
    asked = len(server.requests)
    for name in ("My_LoRA", "My_LoRA.safetensors", "My LoRA!"):
        assert store.get(name, LORA).path.read_bytes() == FIRST
    store.keep_as(second, "My_LoRA", LORA)
    assert store.get("My_LoRA", LORA).path == second.path
    assert first.path.read_bytes() == FIRST
    assert len(server.requests) == asked


@pytest.mark.parametrize("own", ["mine.safetensors", "mine.pt"])
def test_a_file_of_the_operators_keeps_its_name(store: AssetStore, server: FileServer, own: str):
    fetched = fetch(store, server, "/a.safetensors", FIRST)
    path = fetched.path.with_name(own)
    path.write_bytes(SECOND)
    with pytest.raises(BadReference, match=own) as caught:
        store.keep_as(fetched, "mine", LORA)
    assert caught.value.code == "LORA_REFERENCE"
    assert (path.read_bytes(), path.is_symlink()) == (SECOND, False)
    link = path.with_name("link.safetensors")
    link.symlink_to(fetched.name)  # by hand
    with pytest.raises(BadReference):
        store.keep_as(fetch(store, server, "/b.safetensors", SECOND), "link", LORA)


@pytest.mark.parametrize("name", ["", "...", "///", "日本", ".safetensors"])
def test_a_name_that_no_file_can_have(store: AssetStore, server: FileServer, name: str):
    with pytest.raises(BadReference):
        store.keep_as(fetch(store, server, "/a.safetensors", FIRST), name, LORA)


@pytest.mark.parametrize("name", ["../../escaped", "/etc/passwd", "a/b"])
def test_no_name_leaves_the_folder(store: AssetStore, server: FileServer, tmp_path: Path, name: str):
    kept = store.keep_as(fetch(store, server, "/a.safetensors", FIRST), name, LORA)
    assert (tmp_path / "loras" / f"{kept}.safetensors").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["loras"]


def test_a_name_is_neither_listed_nor_counted_and_goes_with_its_file(store: AssetStore, server: FileServer):
    file = fetch(store, server, "/a.safetensors", FIRST)
    store.keep_as(file, "name", LORA)
    os.utime(sidecar_path(file.path), (1, 1))
    assert evict(file.path.parent, len(FIRST) + 1, Cache()) == []
    assert evict(file.path.parent, 1, Cache()) == [file.path]
    with pytest.raises(NotFound):
        store.get("name", LORA)
    store.prepare(LORA)
    assert published(file.path.parent) == []


def test_a_file_in_temporary_space_cannot_be_named(
    store: AssetStore, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "loras").write_text("a file where the folder should be")
    file = fetch(store, server, "/a.safetensors", FIRST)
    with pytest.raises(CacheWriteError, match="temporary space"):
        store.keep_as(file, "name", LORA)


def test_the_readable_part_of_a_name_is_enough_when_only_one_file_has_it(store: AssetStore, server: FileServer):
    file = fetch(store, server, "/x/my-lora.safetensors", FIRST)
    asked = len(server.requests)
    for name in ("my-lora", "my-lora.safetensors", file.name, file.path.stem):
        assert store.get(name, LORA).path == file.path
    assert len(server.requests) == asked
    other = fetch(store, server, "/y/my-lora.safetensors", SECOND)
    for name in ("my-lora", "my-lora.safetensors"):
        with pytest.raises(Ambiguous) as caught:
            store.get(name, LORA)
        assert caught.value.code == "LORA_AMBIGUOUS"
        assert file.name in str(caught.value)
        assert other.name in str(caught.value)
    file.path.with_name("my-lora.safetensors").write_bytes(SECOND)  # a file of that very name comes first
    assert store.get("my-lora", LORA).path.name == "my-lora.safetensors"
