"""A request's LoRAs before the device is needed: cache faults are mended once, and then no file is needed any more."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, BadReference, Cancelled, NotFound
from sdxl_worker.job_run import JobRun
from sdxl_worker.lora.engine import AppliedLora, LoraEngine
from sdxl_worker.lora.ready import make_ready
from sdxl_worker.request import LoraScale, LoraSpec
from sdxl_worker.serving.turns import Turns
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from tests.support.http_server import FileServer, whole


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    return Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras")


@pytest.fixture
def run() -> JobRun:
    return JobRun("job", Turns().ticket())


@pytest.fixture
def server(tmp_path):
    with FileServer() as server:
        server.add("/a.safetensors", whole(write_example_lora(tmp_path / "source").read_bytes()))
        yield server


def ready(settings: Settings, engine: LoraEngine, run: JobRun, *specs: LoraSpec):
    return make_ready(specs, AssetStore(settings), lambda: engine, run)


def test_a_repeat_is_a_cache_hit(settings, engine, run, server):
    spec = LoraSpec(f"{server.origin}/a.safetensors?token=s3cret")
    (first,) = ready(settings, engine, run, spec)
    assert run.facts == {"loras": [f"{server.origin}/a.safetensors"], "cache_hits": 0}
    (again,) = ready(settings, engine, run, spec)
    assert run.facts["cache_hits"] == 1
    assert first.parsed is again.parsed
    assert len(server.asked("/a.safetensors")) == 1


def test_row_46_evicted_between_the_look_and_the_reading(settings, engine, run, server, monkeypatch):
    resolve = AssetStore.get_all
    evictions: list[int] = []

    def evicted_at_once(*arguments):
        files = resolve(*arguments)
        if not evictions:
            files[0].path.unlink()
        evictions.append(1)
        return files

    monkeypatch.setattr(AssetStore, "get_all", evicted_at_once)
    (lora,) = ready(settings, engine, run, LoraSpec(f"{server.origin}/a.safetensors"))
    assert lora.file.path.is_file()
    assert len(evictions) == 2


def test_a_file_that_keeps_vanishing_is_an_error(settings, engine, run, server, monkeypatch):
    resolve = AssetStore.get_all

    def always_evicted(*arguments):
        files = resolve(*arguments)
        files[0].path.unlink()
        return files

    monkeypatch.setattr(AssetStore, "get_all", always_evicted)
    with pytest.raises(NotFound, match="vanished from the cache"):
        ready(settings, engine, run, LoraSpec(f"{server.origin}/a.safetensors"))


def test_row_47_a_damaged_file_is_put_aside_and_fetched_again_once(settings, pipeline, engine, run, server):
    spec = LoraSpec(f"{server.origin}/a.safetensors")
    (before,) = ready(settings, engine, run, spec)
    path = before.file.path
    damage(path)
    fresh = LoraEngine(pipeline, 0)
    (after,) = ready(settings, fresh, run, spec)
    assert after.file.sha256 == before.file.sha256
    assert (settings.lora_cache_dir / ".quarantine" / path.name).is_file()
    assert len(server.asked("/a.safetensors")) == 2


def damage(path: Path) -> None:
    """In a way that neither size nor time betrays."""
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[-4000:] = b"\xff" * 4000  # NaN
    path.write_bytes(content)
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the worker, since root may write anywhere."""
    shutil.rmtree(folder / ".partial")
    (folder / ".partial").write_text("a file where the folder should be")
    for name in ("replace", "unlink", "utime"):
        real = getattr(os, name)

        def refuse(path, *arguments, real=real, **options):
            if str(path).startswith(str(folder)):
                raise OSError(errno.EROFS, "Read-only file system")
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, name, refuse)


def test_a_damaged_file_on_a_read_only_volume_is_fetched_into_temporary_space(
    settings, pipeline, engine, run, server, tmp_path, monkeypatch
):
    spec, assets = LoraSpec(f"{server.origin}/a.safetensors"), AssetStore(settings)
    (before,) = make_ready([spec], assets, lambda: engine, run)
    damage(before.file.path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    make_read_only(settings.lora_cache_dir, monkeypatch)
    for cached in (False, True):
        (after,) = make_ready([spec], assets, lambda: LoraEngine(pipeline, 0), run)
        assert (after.file.sha256, after.file.cached) == (before.file.sha256, cached)
        assert after.file.path.is_relative_to(tmp_path / "tmp")
    assert len(server.asked("/a.safetensors")) == 2


def test_a_bad_file_put_there_by_hand_stays(settings, engine, run):
    path = settings.lora_cache_dir / "mine.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(AssetFileError):
        ready(settings, engine, run, LoraSpec("mine"))
    assert path.is_file()


def test_scale_0_has_only_to_be_a_reference(settings, run):
    zero = LoraScale.uniform(0)
    assert make_ready([LoraSpec("nobody/asks", zero)], AssetStore(settings), lambda: pytest.fail("read"), run) == []
    with pytest.raises(BadReference):
        make_ready([LoraSpec("../x", zero)], AssetStore(settings), lambda: pytest.fail("read"), run)


def test_a_name_is_kept_and_an_operators_file_keeps_its_own(settings, engine, run, server):
    url = f"{server.origin}/a.safetensors"
    (fetched,) = ready(settings, engine, run, LoraSpec(url, name="mine"))
    (named,) = ready(settings, engine, run, LoraSpec("mine", name="mine"))
    assert (named.file.path, named.notes) == (fetched.file.path, ())
    (settings.lora_cache_dir / "theirs.safetensors").write_bytes(fetched.file.path.read_bytes())
    (warned,) = ready(settings, engine, run, LoraSpec(url, index=3, name="theirs"))
    (warning,) = warned.warnings(AppliedLora(1, ()))
    assert warning.startswith("loras[3]: it is not kept under its name: ")
    assert "theirs.safetensors" in warning


def test_a_stopped_job_reads_nothing(settings, engine, run, server):
    run.cancel()
    with pytest.raises(Cancelled):
        ready(settings, engine, run, LoraSpec(f"{server.origin}/a.safetensors"))
    assert not server.asked("/a.safetensors")
