"""Fitness checks pass on a good worker, and say what to change on a bad one."""

import contextlib
import errno
import threading

import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.assets import cache
from sdxl_worker.generate.refiner import load_refiner
from sdxl_worker.serving.fitness import (
    UnhealthyWorker,
    check_cache_folder,
    check_gpu_memory,
    check_model,
    check_refiner,
    startup_line,
)
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker


@pytest.fixture
def worker(pipeline, tmp_path) -> Worker:
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    worker.resident.use(pipeline)
    return worker


def test_a_good_worker_passes(worker):
    for check in worker.checks():
        check()
    assert not [path for path in worker.settings.lora_cache_dir.rglob("*") if path.is_file()]


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UnhealthyWorker, match="MODEL_ID"):
        Worker(Settings(model_id=str(tmp_path / "none"), lora_cache_dir=tmp_path)).checks()[0]()


def test_a_model_that_renders_no_numbers(worker, monkeypatch):
    vae = worker.pipeline.vae
    monkeypatch.setattr(vae, "decode", lambda *_, **__: (torch.full((1, 3, 64, 64), torch.nan),))
    with pytest.raises(UnhealthyWorker, match="MODEL_ID or VAE_ID"):
        check_model(lambda: worker.pipeline)


def test_the_thread_that_draws_ends_with_the_check(worker):
    """Its OpenMP threads would slow those of the jobs' thread: a picture on a queue took twice as long on two cores."""
    drew = []

    @contextlib.contextmanager
    def drawing():
        drew.append(threading.current_thread())
        yield

    check_model(lambda: worker.pipeline, drawing)
    assert len(drew) == 1
    assert drew[0] is not threading.current_thread()
    drew[0].join(60)
    assert not drew[0].is_alive()


def test_an_inpainting_checkpoint_passes_with_a_picture_and_a_mask():
    check_model(lambda: topology.build_sdxl(in_channels=9))


def test_a_model_that_renders_one_colour(worker, monkeypatch):
    monkeypatch.setattr(worker.pipeline.vae, "decode", lambda *_, **__: (torch.zeros(1, 3, 64, 64),))
    with pytest.raises(UnhealthyWorker, match="empty picture"):
        check_model(lambda: worker.pipeline)


def test_the_refiner_renders_as_well(worker, monkeypatch):
    pipeline = worker.pipeline
    check_refiner(lambda: pipeline, lambda: None)
    refiner = load_refiner(Settings(refiner_id="tiny"), pipeline)
    assert refiner is not None
    check_refiner(lambda: pipeline, lambda: refiner)
    monkeypatch.setattr(refiner.pipeline.unet, "forward", lambda *_, **__: (torch.full((2, 4, 8, 8), torch.nan),))
    with pytest.raises(UnhealthyWorker, match="REFINER_ID"):
        check_refiner(lambda: pipeline, lambda: refiner)


def test_a_cache_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnhealthyWorker, match=r"cannot be written .Not a directory.: attach a network volume, or set"):
        check_cache_folder(tmp_path / "file" / "loras")


def test_a_full_volume_is_only_logged(worker, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.Path, "open", full)
    check_cache_folder(worker.settings.lora_cache_dir)
    assert "is full: set LORA_CACHE_MAX_GB" in caplog.text


def test_gpu_memory(worker, monkeypatch):
    class Gpu:
        device = torch.device("cuda")

    worker.resident.use(Gpu())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * 2**30, 24 * 2**30))
    check_gpu_memory(lambda: worker.pipeline)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 * 2**30, 8 * 2**30))
    with pytest.raises(UnhealthyWorker, match=r"only 1.0 of 8.0 GB .* choose a GPU type with more memory"):
        check_gpu_memory(lambda: worker.pipeline)


def test_the_startup_line(worker):
    line = startup_line(worker.settings)
    for part in ("python 3.", "runpod 1.", "torch 2.", "model tiny", str(worker.settings.lora_cache_dir), "GB free"):
        assert part in line
    assert "\n" not in line
    assert "refiner" not in line
    assert "; refiner xl-refiner; " in startup_line(Settings(model_id="tiny", refiner_id="user/xl-refiner"))
