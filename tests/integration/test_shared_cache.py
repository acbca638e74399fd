"""Several real processes on one cache folder: fault rows 43 and 44."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from download_weights import download_lora
from sdxl_worker.assets.folder import prepare_folder
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, partials, published, settings_for
from tests.support.http_server import FileServer, sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A file server; processes started now use `tmp_path` as their cache."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with FileServer() as running:
        yield running


def race(url: str, processes: int, *options: str) -> list[dict[str, Any]]:
    """What each of `processes` got that were all ready before the first of them started."""
    command = [sys.executable, "-m", "tests.support.race_downloads", url, *options]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n"
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate(timeout=500)[0]) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_eight_processes_download_fifty_megabytes_once(server: FileServer, tmp_path: Path):
    content = lora_bytes(megabytes=50)
    got = race(server.add("/a.safetensors", on.whole(content)), 8)
    assert [(item["sha256"], item["recorded"]) for item in got] == [(sha256(content),) * 2] * 8
    assert [item["cached"] for item in got].count(False) == 1
    assert len(server.requests) == 1
    assert (len(published(tmp_path)), partials(tmp_path)) == (1, [])


def test_two_processes_whose_locks_do_nothing_both_succeed(server: FileServer, tmp_path: Path):
    content = lora_bytes(megabytes=5)
    got = race(server.add("/a.safetensors", on.whole(content)), 2, "no-locks")
    assert [item["sha256"] for item in got] == [sha256(content)] * 2
    assert (len(published(tmp_path)), partials(tmp_path)) == (1, [])


def test_a_kill_at_any_moment_leaves_no_bad_file(server: FileServer, tmp_path: Path):
    content = lora_bytes(megabytes=1)
    url = server.add("/a.safetensors", on.whole(content))
    command = [sys.executable, "-m", "tests.support.kill_downloads", url, sha256(content)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ, timeout=550)
    seen = json.loads(done.stdout)
    *killed, unharmed = seen["left"]
    assert (seen["status"], unharmed) == (0, "whole")
    assert set(killed) == {"absent", "whole"}  # before the rename, and between it and the sidecar
    assert seen["partials"] > 0
    prepare_folder(tmp_path, download_timeout=300)
    assert (published(tmp_path), partials(tmp_path)) == ([], [])
    assert download_lora(url, settings=settings_for(tmp_path)).sha256 == sha256(content)
