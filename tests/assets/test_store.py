"""References through the cache, over real HTTP: fault rows 16, 22, 29 to 34, 42 to 47."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from download_weights import download_lora, download_loras
from sdxl_worker import errors
from sdxl_worker.assets import fetch, folder, locks, remote_files
from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.eviction import list_cache
from sdxl_worker.assets.sidecar import read_sidecar, sidecar_path
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.kinds import LORA as LORA_KIND
from sdxl_worker.settings import Settings
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, partials, published, settings_for, wait_until
from tests.support.http_server import FileServer

LORA, OTHER = lora_bytes(1), lora_bytes(2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path / "loras")


def get(url: str, settings: Settings, **options: Any) -> AssetFile:
    return download_lora(url, settings=settings, **options)


def test_a_url_is_downloaded_once_and_described(server: FileServer, settings: Settings):
    url = server.add("/my-lora.safetensors", on.whole(LORA))
    first = get(f"{url}?token=SECRET", settings)
    again = get(f"{url}?token=SECRET", settings)
    assert first.path.read_bytes() == LORA
    assert (first.cached, again.cached) == (False, True)
    assert first.source_sha256 == again.source_sha256 == first.sha256
    assert (first.sha256, first.size, first.name) == (on.sha256(LORA), len(LORA), first.path.name)
    assert first.reference == again.reference == url
    assert len(server.requests) == 1
    read = read_sidecar(first.path)
    assert read is not None
    assert (read[0].base_model, read[0].sha256, read[0].reference) == ("SDXL", on.sha256(LORA), url)
    assert "SECRET" not in sidecar_path(first.path).read_text() + str(list(settings.lora_cache_dir.rglob("*")))
    assert partials(settings.lora_cache_dir) == []


def test_a_lora_for_another_base_model_is_cached_and_named(server: FileServer, settings: Settings):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(320, 4)}
    file = get(server.add("/sd15.safetensors", on.whole(save(tensors))), settings)
    read = read_sidecar(file.path)
    assert read is not None
    assert read[0].base_model == "Stable Diffusion 1.5"


def test_progress_reaches_the_caller(server: FileServer, settings: Settings):
    told: list[tuple[int, int | None]] = []
    get(server.add("/a.safetensors", on.whole(LORA)), settings, on_progress=lambda *state: told.append(state))
    assert told[-1] == (len(LORA), len(LORA))


HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"
BAD_FILES: list[tuple[bytes, type[errors.WorkerError]]] = [
    (HTML, errors.WrongFile),
    (b"", errors.BadFile),
    (LORA[: len(LORA) // 2], errors.BadFile),
    (LORA + b"tail", errors.BadFile),
    ((1 << 60).to_bytes(8, "little") + b"{}", errors.BadFile),
    (os.urandom(4096), errors.AssetFileError),
]


@pytest.mark.parametrize(("content", "error"), BAD_FILES)
def test_a_bad_file_leaves_nothing_behind(
    server: FileServer, settings: Settings, content: bytes, error: type[errors.WorkerError]
):
    url = server.add("/a.safetensors", on.whole(content))
    with pytest.raises(error):
        get(url, settings)
    assert (published(settings.lora_cache_dir), partials(settings.lora_cache_dir)) == ([], [])
    server.add("/a.safetensors", on.whole(LORA))
    assert get(url, settings).path.read_bytes() == LORA


class Hostile:
    """Runs a command when unpickled without care."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self._witness}",)


def saved(tensors: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "dump"),
    [("a.pt", pickle.dumps), ("a.bin", saved), ("a.safetensors", saved), ("b.safetensors", pickle.dumps), ("x", saved)],
)
def test_a_hostile_pickle_is_not_executed(
    server: FileServer, settings: Settings, tmp_path: Path, name: str, dump: Callable[[object], bytes]
):
    witness = tmp_path / "executed"
    with pytest.raises(errors.BadFile):
        get(server.add(f"/{name}", on.whole(dump(Hostile(witness)))), settings)
    assert not witness.exists()
    assert published(settings.lora_cache_dir) == []


@pytest.mark.parametrize("name", ["a.bin", "download"])
def test_a_good_pickle_becomes_safetensors(server: FileServer, settings: Settings, name: str):
    content = saved(load(LORA))
    file = get(server.add(f"/{name}", on.whole(content)), settings)
    assert file.path.suffix == ".safetensors"
    found, expected = load(file.path.read_bytes()), load(LORA)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    again = get(server.origin + f"/{name}", settings)
    for each in (file, again):
        assert (each.sha256, each.source_sha256) == (on.sha256(file.path.read_bytes()), on.sha256(content))
    assert again.cached


def test_a_good_pickle_under_a_safetensors_name_is_refused(server: FileServer, settings: Settings):
    with pytest.raises(errors.BadFile, match="pickle"):
        get(server.add("/a.safetensors", on.whole(saved(load(LORA)))), settings)


def test_the_size_limit_is_the_smaller_one(server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    url = server.add("/a.safetensors", on.whole(LORA))
    with pytest.raises(errors.TooLarge):
        get(url, settings_for(settings.lora_cache_dir, lora_max_mb=len(LORA) / 1e6 / 2))
    monkeypatch.setenv("RUNPOD_MAX_DOWNLOAD_BYTES", "100")
    with pytest.raises(errors.TooLarge):
        get(url, settings)


@pytest.mark.parametrize("damage", [b"", LORA[:-10], LORA[:-1] + b"\0", b"x" * len(LORA)])
def test_a_damaged_file_is_quarantined_and_fetched_once(server: FileServer, settings: Settings, damage: bytes):
    url = server.add("/a.safetensors", on.whole(LORA))
    path = get(url, settings).path
    path.write_bytes(damage)
    os.utime(path, (1, 1))
    file = get(url, settings)
    assert (file.cached, file.path.read_bytes()) == (False, LORA)
    assert (settings.lora_cache_dir / folder.QUARANTINE / path.name).read_bytes() == damage
    assert len(server.requests) == 2


def test_a_copied_volume_keeps_its_files(server: FileServer, settings: Settings, tmp_path: Path):
    url = server.add("/a.safetensors", on.whole(LORA))
    get(url, settings)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in settings.lora_cache_dir.glob("*.safetensors*"):
        shutil.copyfile(path, copy / path.name)  # other times than the sidecar says
    assert get(url, settings_for(copy)).cached
    assert len(server.requests) == 1


def test_a_file_without_its_sidecar_is_checked_and_adopted(server: FileServer, settings: Settings):
    url = server.add("/a.safetensors", on.whole(LORA))
    path = get(url, settings).path
    sidecar_path(path).unlink()
    assert get(url, settings).cached
    sidecar_path(path).write_text("{broken")
    assert get(url, settings).cached
    sidecar_path(path).unlink()
    path.write_bytes(LORA[:-100])
    assert not get(url, settings).cached
    assert len(server.requests) == 2


def test_a_file_that_vanishes_while_it_is_adopted_is_fetched(
    server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    url = server.add("/a.safetensors", on.whole(LORA))
    path = get(url, settings).path
    sidecar_path(path).unlink()
    real = remote_files.file_sha256

    def vanish(found: Path) -> str:
        path.unlink()
        return real(found)

    monkeypatch.setattr(remote_files, "file_sha256", vanish)
    assert not get(url, settings).cached


def test_another_reference_with_the_same_short_hash_is_not_served(server: FileServer, settings: Settings):
    url = server.add("/a.safetensors", on.whole(LORA))
    path = get(url, settings).path
    content = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(content | {"key": "0" * 64}))
    assert not get(url, settings).cached
    assert len(server.requests) == 2


def test_stopping_ends_a_download_and_cleans_up(server: FileServer, settings: Settings):
    stop, release, reached = threading.Event(), threading.Event(), threading.Event()
    url = server.add("/a.safetensors", on.held(LORA, 100, release, reached))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(get, url, settings, should_stop=stop.is_set)
        assert reached.wait(120)
        stop.set()
        with pytest.raises(errors.Cancelled):
            running.result(120)
    assert (published(settings.lora_cache_dir), partials(settings.lora_cache_dir)) == ([], [])


def test_several_jobs_share_one_download(server: FileServer, settings: Settings):
    release, reached = threading.Event(), threading.Event()
    url = server.add("/a.safetensors", on.held(LORA, 100, release, reached))
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(get, url, settings) for _ in range(6)]
        assert reached.wait(120)
        release.set()
        files = [job.result(120) for job in running]
    assert len(server.requests) == 1
    assert [file.cached for file in files].count(False) == 1


def test_a_job_that_waits_can_be_stopped(server: FileServer, settings: Settings):
    release, reached, stop = threading.Event(), threading.Event(), threading.Event()
    url = server.add("/a.safetensors", on.held(LORA, 100, release, reached))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, url, settings)
        assert reached.wait(120)
        second = pool.submit(get, url, settings, should_stop=stop.is_set)
        stop.set()
        with pytest.raises(errors.Cancelled):
            second.result(120)
        release.set()
        assert first.result(120).path.read_bytes() == LORA


def test_locks_that_do_nothing_cost_only_bandwidth(
    server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locks.FileLock, "acquire", lambda *_a, **_o: None)
    monkeypatch.setattr(locks.FileLock, "release", lambda *_a, **_o: None)
    release, reached = threading.Event(), threading.Event()
    url = server.add("/a.safetensors", on.held(LORA, 100, release, reached))
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(get, url, settings) for _ in range(4)]
        wait_until(lambda: len(server.requests) == 4)
        release.set()
        assert all(job.result(120).sha256 == on.sha256(LORA) for job in running)
    assert len(published(settings.lora_cache_dir)) == 1
    assert partials(settings.lora_cache_dir) == []


def test_a_volume_without_locks_still_works(server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.FileLock, "acquire", no_locks)
    assert get(server.add("/a.safetensors", on.whole(LORA)), settings).path.read_bytes() == LORA


def test_a_lock_that_a_dead_worker_left_is_waited_for_in_bounds(
    server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.3)
    url = server.add("/a.safetensors", on.whole(LORA))
    name = get(url, settings).name
    (settings.lora_cache_dir / name).unlink()
    with locks.FileLock(settings.lora_cache_dir / folder.LOCKS / f"{name}.lock"):
        assert get(url, settings).path.read_bytes() == LORA


def test_a_disk_that_is_full_sends_the_file_to_temporary_space(
    server: FileServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached = get(server.add("/cached.safetensors", on.whole(LORA)), settings)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full = settings.lora_cache_dir
    real = folder.temporary_file

    def out_of_space(target: Path, name: str) -> Any:
        if target == full:
            raise errors.CacheWriteError("the cache folder cannot be written (No space left on device)")
        return real(target, name)

    monkeypatch.setattr("sdxl_worker.assets.remote_files.temporary_file", out_of_space)
    url = server.add("/new.safetensors", on.whole(OTHER))
    file = get(url, settings)
    assert file.path.read_bytes() == OTHER
    assert not file.path.is_relative_to(full)
    assert get(url, settings).path == file.path
    assert len(server.asked("/new.safetensors")) == 1
    assert get(server.origin + "/cached.safetensors", settings).path == cached.path


def test_the_folder_behind_a_dangling_link_is_created(server: FileServer, tmp_path: Path):
    (tmp_path / "models").symlink_to(tmp_path / "volume" / "models")
    settings = settings_for(tmp_path / "models" / "loras")
    file = get(server.add("/a.safetensors", on.whole(LORA)), settings)
    assert (tmp_path / "volume" / "models" / "loras" / file.name).read_bytes() == LORA


def test_no_space_anywhere_is_cache_write(
    server: FileServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_write_all", full)
    with pytest.raises(errors.CacheWriteError, match="neither"):
        get(server.add("/a.safetensors", on.whole(LORA)), settings)
    assert partials(settings.lora_cache_dir) == []


@pytest.mark.parametrize("reference", ["absent", "absent.safetensors", "absent.pt"])
def test_a_cached_name_that_is_not_there_makes_no_call(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, reference: str
):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(errors.NotFound):
        get(reference, settings)


def test_secrets_are_in_no_log_and_no_file(server: FileServer, settings: Settings, all_logs: pytest.LogCaptureFixture):
    secret = "-".join(("s3", "cr3t"))
    get(f"{server.add('/a.safetensors', on.status(500), on.whole(LORA))}?token={secret}", settings)
    with pytest.raises(errors.WrongFile) as caught:
        get(f"{server.add('/b.safetensors', on.whole(HTML))}?api_key={secret}", settings)
    logging.getLogger("test").error("failed", exc_info=caught.value)
    written = "".join(path.read_text() for path in settings.lora_cache_dir.rglob("*.json"))
    assert secret not in all_logs.text + written + str(list(settings.lora_cache_dir.rglob("*")))


def test_several_references_are_fetched_in_parallel_and_in_order(server: FileServer, settings: Settings):
    release, reached = threading.Event(), [threading.Event() for _ in range(3)]
    contents = [lora_bytes(seed) for seed in range(3)]
    urls = [
        server.add(f"/{index}.safetensors", on.held(content, 100, release, reached[index]))
        for index, content in enumerate(contents)
    ]
    told: list[tuple[int, int | None]] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            download_loras, [*urls, urls[0]], on_progress=lambda *state: told.append(state), settings=settings
        )
        assert all(event.wait(120) for event in reached)
        release.set()
        files = running.result(120)
    assert [file.path.read_bytes() for file in files] == [*contents, contents[0]]
    assert len(server.requests) == 3
    assert told[-1] == (sum(map(len, contents)), sum(map(len, contents)))


def test_the_first_error_stops_the_others(server: FileServer, settings: Settings):
    release, reached = threading.Event(), threading.Event()
    slow = server.add("/slow.safetensors", on.held(LORA, 100, release, reached))

    def missing_once_the_other_runs(handler: on.Handler) -> None:
        reached.wait(120)
        on.status(404)(handler)

    bad = server.add("/bad.safetensors", missing_once_the_other_runs)
    with pytest.raises(errors.NotFound):
        download_loras([slow, bad], settings=settings)
    assert (published(settings.lora_cache_dir), partials(settings.lora_cache_dir)) == ([], [])


@pytest.mark.parametrize("name", ["file/loras", "a" * 300])
def test_a_cache_folder_that_cannot_be_created_is_one_sentence(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    store = AssetStore(settings_for(tmp_path / name))
    store.prepare(LORA_KIND)
    (record,) = caplog.records
    assert "cannot be created" in record.getMessage()
    assert record.exc_info is None
    assert store.get(server.add("/a.safetensors", on.whole(LORA)), LORA_KIND).path.read_bytes() == LORA
    assert list_cache(tmp_path / name) == store.prune(LORA_KIND) == []
    with pytest.raises(errors.NotFound):
        store.get("absent", LORA_KIND)
