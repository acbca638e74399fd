"""handler.py as a person runs it, with the job in test_input.json."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import SMALL
from tests.integration.worker_process import ROOT, worker_environment


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs handler.py in `tmp_path` with these settings."""

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "handler.py")],
            cwd=tmp_path,
            env=worker_environment(tmp_path / "loras", **more),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


def test_the_job_in_test_input_json_saves_its_picture_says_where_and_shows_a_bar(run, tmp_path):
    job = {"input": {**SMALL, "loras": [{"path": "tiny-example", "scale": 0.8}]}}
    (tmp_path / "test_input.json").write_text(json.dumps(job))
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nSaved output/local_test_1.png\n")
    assert "base64" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    facts = json.loads(line)
    assert (facts["job"], facts["outcome"], facts["loras"]) == ("local_test", "ok", ["tiny-example"])
    saved = Image.open(tmp_path / "output" / "local_test_1.png")
    assert saved.size == (64, 64)
    assert "<lora:tiny-example:0.8>" in saved.info["parameters"]
    assert done.stderr.strip().startswith("downloading")
    assert "2/2" in done.stderr
    assert "Loading" not in done.stdout + done.stderr
    assert "worker: python 3." in done.stdout


def test_a_model_that_is_none_is_a_sentence_at_the_end_and_no_traceback(run, tmp_path):
    (tmp_path / "test_input.json").write_text(json.dumps({"input": SMALL}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    done = run(MODEL_ID=str(tmp_path / "model"))
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence == "the base model model cannot be loaded: it is not a complete SDXL model; check MODEL_ID"
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stdout
