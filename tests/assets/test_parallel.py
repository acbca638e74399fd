"""LORA_PRELOAD, and the bound on parallel downloads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sdxl_worker.assets import parallel
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.kinds import LORA
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, settings_for, wait_until
from tests.support.http_server import FileServer

CONTENT = lora_bytes(1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    with FileServer() as running:
        yield running


def test_preload_leaves_out_what_fails(server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = server.add("/good.safetensors", on.whole(CONTENT))
    bad = server.add("/bad.safetensors", on.whole(b"<html>"))
    (tmp_path / "hand.safetensors").write_bytes(CONTENT)
    references = [good, f"{bad}?token=hunter2", "no such file", f"{server.origin}/absent.safetensors", "hand"]
    with caplog.at_level(logging.ERROR):
        files = AssetStore(settings_for(tmp_path)).preload(references, LORA)
    assert [file.reference for file in files] == [good, "hand"]
    told = sorted(record.getMessage().split(": ")[1] for record in caplog.records)
    assert told == ["LORA_NOT_FOUND", "LORA_NOT_FOUND", "NOT_A_LORA"]
    assert "hunter2" not in caplog.text


def test_no_preload_does_nothing(tmp_path: Path):
    assert AssetStore(settings_for(tmp_path / "absent")).preload([], LORA) == []
    assert not (tmp_path / "absent").exists()


def test_an_unforeseen_error_does_not_keep_the_worker_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_arguments: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(AssetStore, "get", fail)
    assert AssetStore(settings_for(tmp_path)).preload(["a"], LORA) == []
    assert "preload: one LoRA failed" in caplog.text


class Crowd:
    """Counts the requests that are being answered at the same time, and holds them until `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.now = self.most = 0
        self._lock = threading.Lock()

    def reply(self, content: bytes) -> on.Reply:
        def reply(handler: on.Handler) -> None:
            self._count(1)
            self.release.wait(120)
            self._count(-1)  # before the body ends, since only then may the client ask for the next file
            on.whole(content)(handler)

        return reply

    def _count(self, change: int) -> None:
        with self._lock:
            self.now += change
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("way", ["get_all", "preload"])
def test_no_more_than_the_bound_at_once(server: FileServer, tmp_path: Path, way: str):
    crowd, bound = Crowd(), parallel.MAX_PARALLEL
    urls = [server.add(f"/{index}.safetensors", crowd.reply(lora_bytes(index))) for index in range(2 * bound)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(getattr(AssetStore(settings_for(tmp_path, download_timeout=300)), way), urls, LORA)
        try:
            wait_until(lambda: crowd.now >= bound)
            for _ in range(50):  # requests of our own: whoever else wanted to come would have come meanwhile
                assert requests.get(f"{server.origin}/absent", timeout=120).status_code == 404
        finally:
            crowd.release.set()
        assert len(running.result(120)) == 2 * bound
    assert crowd.most == bound == 4
