"""The command line of download_weights.py."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import download_weights
from sdxl_worker.assets.sidecar import sidecar_path
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, published
from tests.support.http_server import FileServer, sha256

LORA, OTHER = lora_bytes(1), lora_bytes(2)
ROOT = Path(download_weights.__file__).parent


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The command line configures the log of its process; here the process is that of the tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A file server, and an environment whose cache is empty."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL_ID", "tiny")
    with FileServer() as running:
        yield running


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = download_weights.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_lora_is_fetched_and_described(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url = server.add("/my.safetensors", on.whole(LORA))
    code, out, _ = run(capsys, "--lora", f"{url}?token=hunter2")
    assert code == 0
    for text in (url, "SDXL", sha256(LORA), str(tmp_path)):
        assert text in out
    code, out, err = run(capsys, "--lora", f"{url}?token=hunter2", "--json", "--inspect")
    facts = json.loads(out)
    assert (facts["cached"], facts["base_model"], facts["facts"]["modules"]) == (True, "SDXL", 2)
    assert "hunter2" not in out + err


def test_an_embedding_is_fetched_and_described_and_stands_in_the_list(
    server: FileServer, capsys: pytest.CaptureFixture[str]
):
    content = save({"clip_l": np.ones((2, 768), np.float32), "clip_g": np.ones((2, 1280), np.float32)})
    url, lora = server.add("/bad-hands.safetensors", on.whole(content)), server.add("/a.safetensors", on.whole(LORA))
    code, out, _ = run(capsys, "--embedding", url, "--json", "--inspect")
    facts = json.loads(out)
    assert (code, facts["format"], facts["base_model"], facts["facts"]["vectors"]) == (
        0,
        "textual inversion",
        "SDXL",
        2,
    )
    code, _, err = run(capsys, "--embedding", lora)
    assert code == 1
    assert "error: NOT_AN_EMBEDDING: the file is a LoRA, not an embedding: name it in `loras`" in err
    _, out, _ = run(capsys, "--list", "--json")
    assert [(item["reference"], item["format"]) for item in json.loads(out)] == [(url, "textual inversion")]


def checkpoint_bytes() -> bytes:
    """An inpainting SDXL that predicts v, as far as its header says."""
    tensors: dict[str, np.ndarray] = {
        "model.diffusion_model.input_blocks.0.0.weight": np.zeros((8, 9, 3, 3), np.float16),
        "conditioner.embedders.1.model.ln_final.weight": np.zeros(8, np.float16),
        "v_pred": np.zeros(0, np.float32),
        "ztsnr": np.zeros(0, np.float32),
    }
    return save(tensors)


def test_inspect_says_what_a_checkpoint_is(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    local, lora = tmp_path / "my-model.safetensors", tmp_path / "my-lora.safetensors"
    local.write_bytes(checkpoint_bytes())
    lora.write_bytes(LORA)
    code, out, _ = run(capsys, "--checkpoint", str(local), str(lora), "--inspect", "--json")
    model, other = json.loads(out)
    assert (code, model["path"], model["size"]) == (0, str(local), len(checkpoint_bytes()))
    assert model["facts"] == {
        "is": "SDXL, inpainting",
        "in_channels": 9,
        "prediction": "v_prediction",
        "zero_terminal_snr": True,
        "said_by": "the tensor v_pred",
        "parts": ["UNet", "text encoders"],
        "tensors": 4,
        "dtype": "float16",
    }
    assert other["facts"]["is"] == "not a checkpoint"
    code, out, _ = run(capsys, "--checkpoint", str(local), "--inspect")
    assert code == 0
    assert "is                 SDXL, inpainting\n" in out
    assert "prediction         v_prediction\n" in out


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my-model.safetensors").write_bytes(checkpoint_bytes()[:-1])
    code, out, err = run(capsys, "--checkpoint", str(tmp_path / "my-model.safetensors"), "--inspect")
    assert (code, out) == (1, "")
    assert "error: MODEL_UNAVAILABLE: the file holds" in err


def test_several_loras_give_a_list(server: FileServer, capsys: pytest.CaptureFixture[str]):
    urls = [server.add(f"/{name}.safetensors", on.whole(content)) for name, content in (("a", LORA), ("b", OTHER))]
    code, out, _ = run(capsys, "--lora", *urls, "--json")
    assert [item["reference"] for item in json.loads(out)] == urls
    assert code == 0


def test_a_failure_is_one_line_with_its_code(server: FileServer, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "--lora", f"{server.origin}/absent.safetensors?token=hunter2")
    assert (code, out) == (1, "")
    assert err.count("error: LORA_NOT_FOUND: ") == 1
    assert "Traceback" not in err
    assert "hunter2" not in err


def test_list_as_table_and_as_json(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url = server.add("/my.safetensors", on.whole(LORA))
    (tmp_path / "hand.pt").write_bytes(b"x")
    run(capsys, "--lora", url)
    _, out, _ = run(capsys, "--list")
    assert url in out
    assert "hand.pt (by hand)" in out
    assert "2 files" in out
    _, out, _ = run(capsys, "--list", "--json")
    listed = {item["reference"]: item for item in json.loads(out)}
    assert (listed[url]["size"], listed[url]["base_model"], listed[url]["by_hand"]) == (len(LORA), "SDXL", False)
    assert listed[url]["last_used"].endswith("Z")
    assert listed["hand.pt"]["by_hand"]


def test_verify_and_prune(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, content in (("a", LORA), ("b", OTHER)):
        run(capsys, "--lora", server.add(f"/{name}.safetensors", on.whole(content)))
    assert run(capsys, "--verify")[0] == 0
    path = next(tmp_path.glob("*_a.safetensors"))
    path.write_bytes(LORA[:-1] + b"!")
    code, out, _ = run(capsys, "--verify", "--json")
    assert code == 1
    assert {item["name"]: item["verdict"] for item in json.loads(out)}[path.name] == "quarantined"
    assert not sidecar_path(path).exists()
    assert len(published(tmp_path)) == 1
    _, out, _ = run(capsys, "--prune")
    assert out == f"removed {path.name}\n"
    assert run(capsys, "--prune", "--json")[1] == '{\n  "removed": []\n}\n'


def test_the_base_model_is_what_no_option_means(server: FileServer, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "--json")
    assert (code, json.loads(out)["kind"], "refiner" in json.loads(out)) == (0, "tiny", False)


@pytest.mark.parametrize(
    ("variable", "index", "fact"),
    [("REFINER_ID", "model_index.json", "refiner_path"), ("PREVIEW_VAE_ID", "config.json", "preview_vae")],
)
def test_what_goes_with_it_is_fetched_with_it(
    variable: str,
    index: str,
    fact: str,
    server: FileServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / index).write_text("{}")
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    code, out, _ = run(capsys, "--json")
    assert (code, json.loads(out)[fact]) == (0, str(tmp_path / "there"))
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    code, _, err = run(capsys)
    assert (code, variable in err) == (1, True)


def test_a_missing_base_model_says_what_to_do(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MODEL_ID", "/no/such/folder")
    code, out, err = run(capsys)
    assert (code, out) == (1, "")
    assert "error: MODEL_UNAVAILABLE: MODEL_ID" in err


def test_a_variable_that_cannot_be_read_is_named(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LORA_MAX_MB", "many")
    code, _, err = run(capsys, "--list")
    assert code == 1
    assert "LORA_MAX_MB" in err


@pytest.mark.parametrize("others", [[], ["--list"], ["--json"]], ids=" ".join)
def test_inspect_without_a_lora_is_a_usage_error(
    server: FileServer, capsys: pytest.CaptureFixture[str], others: list[str]
):
    with pytest.raises(SystemExit) as stop:
        download_weights.main(["--inspect", *others])
    assert stop.value.code == 2
    assert "--inspect goes with --lora, --embedding or --checkpoint" in capsys.readouterr().err
    assert server.requests == []


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, download_weights\n"
        "try: download_weights.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'runpod', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("--lora", "--list", "--prune", "--verify", "MODEL_ID", "civitai:ID@VERSION"):
        assert word in done.stdout
