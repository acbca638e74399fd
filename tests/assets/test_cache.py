"""The cache folder: start-up cleaning, sidecars, temporary files, files in use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdxl_worker import errors
from sdxl_worker.assets import folder as on_disk
from sdxl_worker.assets.cache import Cache
from sdxl_worker.assets.folder import prepare_folder, temporary_file
from sdxl_worker.assets.owner import is_left_over, owner_tag
from sdxl_worker.assets.sidecar import Sidecar, read_sidecar, sidecar_path
from sdxl_worker.assets.temporary_space import temporary_space, temporary_space_path
from sdxl_worker.kinds import LORA
from tests.support.download_files import partials


def entry(folder: Path, name: str = "a.safetensors", content: bytes = b"x", key: str = "k") -> Path:
    path = folder / name
    path.write_bytes(content)
    stat = path.stat()
    Cache().write_sidecar(path, Sidecar(name, stat.st_size, stat.st_mtime_ns, "", key))
    return path


def partial(folder: Path, owner: str, *, age_s: float = 0) -> Path:
    path = folder / on_disk.PARTIAL / f"a.safetensors.{owner}~abcd.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_only_dead_workers_files_are_cleaned_at_start(tmp_path: Path):
    gone = subprocess.run(
        [sys.executable, "-c", "from sdxl_worker.assets.owner import owner_tag; print(owner_tag())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    host, pid, born = owner_tag().split("~")
    alive = [partial(tmp_path, owner_tag(), age_s=1e6), partial(tmp_path, "elsewhere~1~1", age_s=30)]
    dead = [
        partial(tmp_path, gone),
        partial(tmp_path, f"{host}~{pid}~{int(born) - 1}"),  # the same id before the container was restarted
        partial(tmp_path, "elsewhere~2~2", age_s=400),
    ]
    prepare_folder(tmp_path, download_timeout=300)
    assert all(path.exists() for path in alive)
    assert not any(path.exists() for path in dead)


def test_the_folder_behind_a_dangling_link_is_created(tmp_path: Path):
    (tmp_path / "models").symlink_to(tmp_path / "volume" / "models")
    prepare_folder(tmp_path / "models" / "loras", download_timeout=300)
    assert (tmp_path / "volume" / "models" / "loras").is_dir()


def test_a_folder_that_cannot_be_made_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    prepare_folder(tmp_path / "file" / "loras", download_timeout=300)
    assert "cannot be created" in caplog.text


def test_sidecars_without_a_file_and_old_locks_are_cleaned(tmp_path: Path):
    kept, orphan = entry(tmp_path), entry(tmp_path, "b.safetensors")
    orphan.unlink()
    os.utime(sidecar_path(orphan), (1, 1))
    lock = tmp_path / on_disk.LOCKS / "a.lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    (tmp_path / "notes.json").write_text("{}")
    prepare_folder(tmp_path, download_timeout=300)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        kept.name,
        f"{kept.name}.json",
        "notes.json",
    ]
    assert not lock.exists()


def test_look_up_wants_everything_to_agree(tmp_path: Path):
    look_up = Cache().look_up
    path = entry(tmp_path)
    assert look_up(path, "k") is not None
    assert look_up(path, "other") is None
    assert look_up(tmp_path / "absent", "k") is None
    path.write_bytes(b"longer")
    assert look_up(path, "k") is None
    linked = tmp_path / "linked.safetensors"
    entry(tmp_path, linked.name)
    linked.unlink()
    linked.symlink_to(path)
    assert look_up(linked, "k") is None


SHA_IS_NO_TEXT = '{"reference": "a", "size": 1, "mtime_ns": 0, "sha256": ["x"], "key": "k"}'


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"size": 1}', '{"unknown": 1}', "[" * 200_000, SHA_IS_NO_TEXT]
)
def test_a_broken_sidecar_is_none(tmp_path: Path, content: str):
    path = entry(tmp_path)
    sidecar_path(path).write_text(content)
    assert read_sidecar(path) is None
    assert Cache().look_up(path, "k") is None


def test_a_sidecar_that_cannot_be_written_is_remembered(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    (tmp_path / on_disk.PARTIAL).write_text("a file where the folder should be")  # root may write anywhere
    stat = path.stat()
    cache = Cache()
    written = cache.write_sidecar(path, Sidecar("a", stat.st_size, stat.st_mtime_ns, "", "k"))
    assert cache.look_up(path, "k") == written
    assert cache.look_up(path, "other") is None
    assert Cache().look_up(path, "k") is None
    path.write_bytes(b"changed")
    assert cache.look_up(path, "k") is None


def test_a_use_is_noted_but_not_every_time(tmp_path: Path):
    path = entry(tmp_path)
    sidecar = sidecar_path(path)
    os.utime(sidecar, (1000, 1000))
    Cache().look_up(path, "k")
    noted = sidecar.stat().st_mtime_ns
    assert noted > 1000e9
    Cache().look_up(path, "k")
    assert sidecar.stat().st_mtime_ns == noted


def test_files_in_use_are_held_and_count_as_used(tmp_path: Path):
    path = entry(tmp_path)
    os.utime(sidecar_path(path), (1000, 1000))
    cache = Cache()
    with cache.in_use([path, path, tmp_path / "absent"]), cache.in_use([path]):
        assert cache.is_held(path)
    assert not cache.is_held(path)
    assert sidecar_path(path).stat().st_mtime > 1000


def test_a_temporary_file_goes_away_with_an_error(tmp_path: Path):
    def fail() -> None:
        with temporary_file(tmp_path, "a") as (path, handle):
            handle.write(b"x")
            assert path.parent.parent == tmp_path
            assert not is_left_over(path, older_than_s=0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert partials(tmp_path) == []


def test_temporary_space_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not temporary_space_path(LORA).exists()
    assert temporary_space(LORA).stat().st_mode & 0o777 == 0o700
    temporary_space(LORA).rmdir()
    temporary_space_path(LORA).symlink_to(tmp_path)
    with pytest.raises(errors.CacheWriteError):
        temporary_space(LORA)
