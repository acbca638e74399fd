"""Pickles: good ones give the same tensors, hostile ones give an error and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.pickles import convert_pickle
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import BadFile, Cancelled, FetchTimeout, WorkerError
from sdxl_worker.kinds import LORA
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, partials, published, settings_for
from tests.support.fresh_process import cost_of
from tests.support.http_server import FileServer

TENSORS = {"lora_unet_x.lora_up.weight": torch.randn(4, 2).half(), "lora_unet_x.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("content", [TENSORS, {"state_dict": TENSORS, "step": 3}], ids=["plain", "nested"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_good_pickle_keeps_every_bit(content, zipped: bool, tmp_path: Path):
    source, target = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    convert_pickle(source, target, Budget.start(600))
    loaded = load_file(str(target))
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


class _Exploit:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path):
    marker, source, target = tmp_path / "executed", tmp_path / "a.pt", tmp_path / "a.safetensors"
    source.write_bytes(pickle.dumps(_Exploit(marker)))
    with pytest.raises(BadFile, match="cannot be read safely"):
        convert_pickle(source, target, Budget.start(600))
    torch.save({"x": _Exploit(marker)}, source)
    with pytest.raises(BadFile, match="cannot be read safely"):
        convert_pickle(source, target, Budget.start(600))
    assert not marker.exists()
    assert not target.exists()


def test_a_pickle_that_expands_is_refused_and_costs_the_worker_nothing(tmp_path: Path):
    source, target = tmp_path / "a.bin", tmp_path / "a.safetensors"
    # One element, claimed to be half a gigabyte of them by its strides.
    torch.save({"x.lora_up.weight": torch.zeros(1).expand(2**27)}, source)
    assert source.stat().st_size < 4096
    setup = f"""
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.pickles import convert_pickle
from sdxl_worker.errors import BadFile
source, target = Path({str(source)!r}), Path({str(target)!r})
"""
    code = """
try:
    convert_pickle(source, target, Budget.start(600))
except BadFile as error:
    assert "inflates" in str(error), error
else:
    raise AssertionError("accepted")
"""
    assert cost_of(code, setup)[0] < 32 * 2**20
    assert not target.exists()


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The converting processes that are started from now on."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def remember(command, *arguments, **options):
        process = start(command, *arguments, **options)
        if "sdxl_worker.assets.pickles" in command:
            started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", remember)
    return started


@pytest.mark.parametrize("ends_by", [Cancelled, FetchTimeout])
def test_a_conversion_ends_with_the_job(ends_by: type[WorkerError], tmp_path: Path, conversions):
    source, target = tmp_path / "a.pt", tmp_path / "a.safetensors"
    os.mkfifo(source)  # nobody writes to it: the process waits for ever
    budgets = {Cancelled: Budget.start(600, lambda: bool(conversions)), FetchTimeout: Budget.start(0.5)}
    with pytest.raises(ends_by):
        convert_pickle(source, target, budgets[ends_by])
    assert [process.returncode for process in conversions] == [-signal.SIGKILL]
    assert not target.exists()


@pytest.mark.parametrize("is_local", [True, False])
def test_a_stopped_job_leaves_no_conversion_behind(is_local: bool, tmp_path: Path, server: FileServer, conversions):
    content = io.BytesIO()
    torch.save(load(lora_bytes()), content)
    (tmp_path / "a.pt").write_bytes(content.getvalue())
    reference = "a.pt" if is_local else server.add("/a.pt", on.whole(content.getvalue()))
    store = AssetStore(settings_for(tmp_path))
    with pytest.raises(Cancelled):
        store.get(reference, LORA, should_stop=lambda: bool(conversions))
    assert [process.returncode for process in conversions] == [-signal.SIGKILL]
    assert (published(tmp_path), partials(tmp_path)) == (["a.pt"], [])
    assert store.get(reference, LORA).path.suffix == ".safetensors"


def test_a_compressed_pickle_that_inflates_is_refused(tmp_path: Path):
    plain, source, target = tmp_path / "plain.pt", tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"x.lora_up.weight": torch.zeros(75 * 2**20 // 4)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert source.stat().st_size < 200_000
    with pytest.raises(BadFile, match="inflates"):
        convert_pickle(source, target, Budget.start(600))


@pytest.mark.parametrize("content", [b"", b"garbage", b"<html>", b"\x80\x02}q\x00."])
def test_a_broken_pickle_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(BadFile):
        convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors", Budget.start(600))


def test_a_pickle_without_tensors_says_so(tmp_path: Path):
    torch.save({"a": "text"}, tmp_path / "a.pt")
    with pytest.raises(BadFile, match="something other than a table of tensors"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors", Budget.start(600))
