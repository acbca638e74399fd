"""Eviction, listing, pruning and verifying the cache."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_worker.assets import eviction, report
from sdxl_worker.assets.cache import Cache
from sdxl_worker.assets.eviction import list_cache, verify
from sdxl_worker.assets.folder import QUARANTINE
from sdxl_worker.assets.sidecar import Sidecar, sidecar_path
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.kinds import LORA
from tests.support.download_files import published, settings_for
from tests.support.http_server import sha256

CONTENT = b"x" * 1000


def put(folder: Path, name: str, used_s_ago: float, *, by_hand: bool = False) -> Path:
    path = folder / f"{name}.safetensors"
    path.write_bytes(CONTENT)
    stat = path.stat()
    key = "" if by_hand else "key"
    Cache().write_sidecar(path, Sidecar(name, stat.st_size, stat.st_mtime_ns, sha256(CONTENT), key, "LoRA", "SDXL"))
    used_at = time.time() - used_s_ago
    os.utime(sidecar_path(path), (used_at, used_at))
    return path


def evict(folder: Path, files: float, cache: Cache | None = None) -> list[Path]:
    """Down to what so many files take."""
    return eviction.evict(folder, files * len(CONTENT), cache or Cache())


def test_least_recently_used_goes_first(tmp_path: Path):
    for index, age in enumerate((500, 900, 700, 300)):
        put(tmp_path, str(index), age)
    evict(tmp_path, 2)
    assert published(tmp_path) == ["0.safetensors", "3.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0.safetensors.json", "3.safetensors.json"]


def test_no_limit_removes_nothing(tmp_path: Path):
    put(tmp_path, "a", 1e6)
    assert evict(tmp_path, 0) == []


def test_files_by_hand_are_neither_removed_nor_counted(tmp_path: Path):
    put(tmp_path, "hand", 1e6, by_hand=True)
    (tmp_path / "new.pt").write_bytes(CONTENT)
    (tmp_path / "unchecked.safetensors").write_bytes(CONTENT)
    put(tmp_path, "own", 1e5)
    evict(tmp_path, 1)
    assert len(published(tmp_path)) == 4
    evict(tmp_path, 0.5)
    assert published(tmp_path) == ["hand.safetensors", "new.pt", "unchecked.safetensors"]


def test_files_in_use_and_just_used_stay(tmp_path: Path):
    held = put(tmp_path, "held", 1e6)
    put(tmp_path, "old", 1e5)
    put(tmp_path, "recent", eviction.GRACE_S / 2)
    cache = Cache()
    with cache.in_use([held]):
        os.utime(sidecar_path(held), (1, 1))
        evict(tmp_path, 0.5, cache)
        assert published(tmp_path) == ["held.safetensors", "recent.safetensors"]
    evict(tmp_path, 0.5)
    assert published(tmp_path) == ["recent.safetensors"]


def test_a_use_by_another_worker_during_the_eviction_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = put(tmp_path, "a", 1e6)
    listed = list_cache(tmp_path)
    monkeypatch.setattr(eviction, "list_cache", lambda _: listed)
    os.utime(sidecar_path(path))
    assert evict(tmp_path, 0.5) == []


def test_many_workers_evict_at_once(tmp_path: Path):
    for index in range(40):
        put(tmp_path, f"{index:02}", 1000 - index)
    start = threading.Barrier(8)

    def run() -> None:
        start.wait()
        evict(tmp_path, 10)

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(run) for _ in range(8)]:
            job.result()
    assert published(tmp_path) == [f"{index}.safetensors" for index in range(30, 40)]


def test_list_is_sorted_by_last_use(tmp_path: Path):
    put(tmp_path, "a", 100)
    put(tmp_path, "b", 10)
    (tmp_path / "notes.txt").write_text("")
    assert [item.path.stem for item in list_cache(tmp_path)] == ["b", "a"]
    assert list_cache(tmp_path / "absent") == []


def test_verify_quarantines_silent_damage(tmp_path: Path):
    good, bad, hand = put(tmp_path, "good", 1), put(tmp_path, "bad", 1), put(tmp_path, "hand", 1, by_hand=True)
    (tmp_path / "new.pt").write_bytes(b"")
    for path in (bad, hand):
        before = path.stat()
        path.write_bytes(b"y" + CONTENT[1:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert {item.path.stem: verdict for item, verdict in verify(tmp_path)} == {
        "good": "ok",
        "bad": "quarantined",
        "hand": "changed",
        "new": "unchecked",
    }
    assert (good.exists(), bad.exists(), hand.exists()) == (True, False, True)
    assert (tmp_path / QUARANTINE / bad.name).exists()
    AssetStore(settings_for(tmp_path)).prune(LORA)
    assert list((tmp_path / QUARANTINE).iterdir()) == []


def test_a_use_in_the_future_does_not_keep_a_file_for_ever(tmp_path: Path):
    put(tmp_path, "recent", eviction.GRACE_S / 2)
    future = put(tmp_path, "future", -1e9)
    os.utime(future, (1e9, 1e9))
    evict(tmp_path, 1)
    assert published(tmp_path) == ["recent.safetensors"]


def test_a_folder_in_the_quarantine_does_not_stop_pruning(tmp_path: Path):
    quarantine = tmp_path / QUARANTINE
    (quarantine / "folder" / "inside").mkdir(parents=True)
    (quarantine / "folder" / "file").write_text("")
    for name in ("a", "z"):
        (quarantine / name).write_text("")
    AssetStore(settings_for(tmp_path)).prune(LORA)
    assert list(quarantine.iterdir()) == []


def test_verify_goes_on_when_a_file_vanishes_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone, good = put(tmp_path, "gone", 1), put(tmp_path, "good", 2)
    listed = list_cache(tmp_path)
    monkeypatch.setattr(eviction, "list_cache", lambda _: listed)
    gone.unlink()
    assert {item.path: verdict for item, verdict in verify(tmp_path)} == {gone: "vanished", good: "ok"}


ODD_SIDECARS = [
    "[" * 200_000,
    '{"reference": 1, "size": "x", "mtime_ns": 0, "sha256": null}',
    '{"reference": "a", "size": 1000, "mtime_ns": 0, "sha256": 5}',
    '{"reference": "\\ud800", "size": 1000, "mtime_ns": 0, "sha256": ""}',
]


@pytest.mark.parametrize("content", ODD_SIDECARS, ids=["deep", "types", "sha256", "surrogate"])
def test_odd_sidecars_are_listed_and_verified_as_unchecked(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
):
    path = put(tmp_path, "a", 1)
    sidecar_path(path).write_text(content)
    (item,) = list_cache(tmp_path)
    assert item.sidecar is None
    report.write_list([item])
    report.write_json([report.listed_json(item)])
    assert "a.safetensors" in capsys.readouterr().out
    assert [verdict for _, verdict in verify(tmp_path)] == ["unchecked"]


def test_what_is_not_a_file_is_not_listed(tmp_path: Path):
    path = put(tmp_path, "pipe", 1)
    path.unlink()
    os.mkfifo(path)
    (tmp_path / "folder.safetensors").mkdir()
    assert list_cache(tmp_path) == []


def test_a_pipe_as_sidecar_holds_nobody_up(tmp_path: Path):
    path = put(tmp_path, "a", 1)
    sidecar_path(path).unlink()
    os.mkfifo(sidecar_path(path))
    with ThreadPoolExecutor(1) as pool:
        try:
            assert [item.sidecar for item in pool.submit(list_cache, tmp_path).result(120)] == [None]
        finally:
            os.close(os.open(sidecar_path(path), os.O_RDWR | os.O_NONBLOCK))  # lets a reader go that waits for a writer
