"""Files that an operator put into the cache folder: fault rows 14 to 16, 31 to 34."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from download_weights import download_lora
from sdxl_worker import errors, kinds
from sdxl_worker.assets import local_files
from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.sidecar import read_sidecar
from sdxl_worker.assets.store import AssetStore
from tests.support.download_files import lora_bytes, partials, settings_for
from tests.support.http_server import sha256

LORA, OTHER = lora_bytes(1), lora_bytes(2)


def get(reference: str, folder: Path, **changes: object) -> AssetFile:
    return download_lora(reference, settings=settings_for(folder, **changes))


def pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(load(content), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))


def test_name_with_and_without_suffix_and_absolute_path(tmp_path: Path):
    path = tmp_path / "my.lora.safetensors"
    path.write_bytes(LORA)
    for reference in ("my.lora", "my.lora.safetensors", str(path)):
        file = get(reference, tmp_path)
        assert (file.path, file.sha256, file.cached) == (path, sha256(LORA), True)
    read = read_sidecar(path)
    assert read is not None
    assert (read[0].by_hand, read[0].base_model) == (True, "SDXL")


def test_a_file_is_checked_once_and_again_when_it_changes(tmp_path: Path):
    checked: list[Path] = []

    def check(path: Path) -> Mapping[str, Any]:
        checked.append(path)
        return kinds.LORA.check(path)

    kind = replace(kinds.LORA, check=check)
    path = tmp_path / "a.safetensors"
    path.write_bytes(LORA)
    store = AssetStore(settings_for(tmp_path))
    store.get("a", kind)
    store.get("a", kind)
    assert len(checked) == 1
    path.write_bytes(OTHER)
    os.utime(path, (1, 1))
    assert store.get("a", kind).sha256 == sha256(OTHER)
    assert len(checked) == 2


def test_a_folder_that_cannot_be_written_is_checked_once_all_the_same(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(LORA)
    (tmp_path / ".partial").write_text("a file where the folder should be")  # root may write anywhere
    store = AssetStore(settings_for(tmp_path))
    store.get("a", kinds.LORA)
    twice = replace(kinds.LORA, check=lambda _: pytest.fail("checked twice"))
    assert store.get("a", twice).sha256 == sha256(LORA)


def test_a_pickle_is_converted_once_and_again_when_it_changes(tmp_path: Path):
    source = tmp_path / "a.pt"
    source.write_bytes(pickled(LORA))
    first = get("a", tmp_path)
    assert first.source_sha256 == sha256(source.read_bytes())
    assert load(first.path.read_bytes()).keys() == load(LORA).keys()
    inode = first.path.stat().st_ino
    assert get("a.pt", tmp_path).path.stat().st_ino == inode
    source.write_bytes(pickled(OTHER))
    os.utime(source, (1, 1))
    again = get("a", tmp_path)
    assert (again.path, again.sha256 == first.sha256) == (first.path, False)
    assert source.exists()
    assert partials(tmp_path) == []


def test_bad_files_by_hand_are_refused_and_left_alone(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path}/executed",)

    contents = {
        "html.safetensors": b"<html>",
        "empty.safetensors": b"",
        "cut.safetensors": LORA[:-5],
        "hostile.pt": pickle.dumps(Hostile()),
        "hostile.safetensors": pickle.dumps(Hostile()),
        "text.bin": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(errors.AssetFileError):
            get(name, tmp_path)
        assert (tmp_path / name).read_bytes() == content
    assert not (tmp_path / "executed").exists()
    assert partials(tmp_path) == []


def test_links_out_of_the_folder_are_refused(tmp_path: Path):
    folder, outside = tmp_path / "loras", tmp_path / "outside.safetensors"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(LORA)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "nowhere.safetensors").symlink_to(tmp_path / "absent")
    (folder / "folder.safetensors").mkdir()
    references = ["link", "link.safetensors", f"{folder}/link.safetensors", f"{folder}/up/outside.safetensors"]
    for reference in [*references, "nowhere", "folder", f"{folder}/up/../outside.safetensors"]:
        with pytest.raises(errors.BadReference):
            get(reference, folder)
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(errors.BadReference):
        get("pipe", folder)
    os.mkfifo(folder / "0123456789ab_fetched.safetensors")
    (folder / "ba9876543210_fetched.safetensors").symlink_to(outside)
    with pytest.raises(errors.NotFound):
        get("fetched", folder)
    (folder / "sub" / "real.safetensors").write_bytes(LORA)
    (folder / "inside.safetensors").symlink_to(folder / "sub" / "real.safetensors")
    assert get("inside", folder).sha256 == sha256(LORA)
    assert get(f"{folder}/sub/real.safetensors", folder).sha256 == sha256(LORA)


def test_the_size_limit_holds(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(LORA)
    with pytest.raises(errors.TooLarge):
        get("a", tmp_path, lora_max_mb=0.001)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [(FileNotFoundError(2, "No such file"), errors.NotFound), (PermissionError(13, "Denied"), errors.BadFile)],
)
def test_a_file_that_vanishes_or_may_not_be_read_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: OSError, error: type[errors.WorkerError]
):
    (tmp_path / name).write_bytes(LORA)

    def fail(_path: Path) -> bool:
        raise fault

    monkeypatch.setattr(local_files, "is_pickle", fail)
    with pytest.raises(error, match="a"):
        get("a", tmp_path)
