"""handler.py as a person runs it, with the job in test_input.json."""

from __future__ import annotations

import json
import subprocess
import sys

from PIL import Image

from tests.integration.conftest import SMALL
from tests.integration.worker_process import ROOT, worker_environment


def test_the_job_in_test_input_json_saves_its_picture_says_where_and_shows_a_bar(tmp_path):
    job = {"input": {**SMALL, "loras": [{"path": "tiny-example", "scale": 0.8}]}}
    (tmp_path / "test_input.json").write_text(json.dumps(job))
    environment = worker_environment(tmp_path / "loras")
    done = subprocess.run(
        [sys.executable, str(ROOT / "handler.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
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
