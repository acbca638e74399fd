"""The hash in a picture's text is the one that A1111, Forge and Civitai look up."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_worker.assets.sidecar import sidecar_path
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.job_run import JobRun
from sdxl_worker.lora.ready import make_ready
from sdxl_worker.request import LoraSpec
from sdxl_worker.serving.turns import Turns
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from tests.support.http_server import FileServer, whole


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    return Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras")


@pytest.fixture
def example(tmp_path) -> Path:
    return write_example_lora(tmp_path / "source")


@pytest.fixture
def pickled(example) -> bytes:
    buffer = io.BytesIO()
    torch.save(load_file(example), buffer)
    return buffer.getvalue()


def printed(settings: Settings, engine, reference: str) -> str:
    run = JobRun("job", Turns().ticket())
    (lora,) = make_ready([LoraSpec(reference)], AssetStore(settings), lambda: engine, run)
    return lora.used.hash


def addnet_hash(content: bytes) -> str:
    """kohya's `addnet_hash_safetensors`, as A1111 shows it: everything after the header, 12 digits."""
    (header,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[8 + header :]).hexdigest()[:12]


def test_of_a_safetensors_file_it_is_that_of_the_data(settings, engine, example):
    with FileServer() as server:
        url = server.add("/a.safetensors", whole(example.read_bytes()))
        assert printed(settings, engine, url) == addnet_hash(example.read_bytes())


def test_a_sidecar_of_before_says_it(settings, engine, example):
    with FileServer() as server:
        url = server.add("/a.safetensors", whole(example.read_bytes()))
        printed(settings, engine, url)
        (path,) = settings.lora_cache_dir.glob("*.safetensors")
        sidecar = json.loads(sidecar_path(path).read_text())
        sidecar["facts"]["autov3"] = "0123456789ab"
        sidecar_path(path).write_text(json.dumps(sidecar))
        assert printed(settings, engine, url) == "0123456789ab"


def test_of_a_pickle_it_is_that_of_the_file_that_was_fetched(settings, engine, pickled):
    with FileServer() as server:
        url = server.add("/a.pt", whole(pickled))
        assert printed(settings, engine, url) == hashlib.sha256(pickled).hexdigest()[:12]


def test_of_a_pickle_put_there_by_hand_too(settings, engine, pickled):
    settings.lora_cache_dir.mkdir()
    (settings.lora_cache_dir / "mine.pt").write_bytes(pickled)
    assert printed(settings, engine, "mine.pt") == hashlib.sha256(pickled).hexdigest()[:12]
