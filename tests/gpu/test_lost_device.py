"""A CUDA error in a worker's process: it says so, takes no more jobs, and ends by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.gpu.tiny_worker import FORMATS
from tests.support.readme import ROOT


@pytest.mark.gpu
@pytest.mark.parametrize("names", [(), FORMATS, ("LoRA",)], ids=["plain", "loras", "kernel"])
def test_row_50_an_assertion_in_a_kernel(names: tuple[str, ...]) -> None:
    """Where LoRAs are merged, what the caller hears is that they cannot be taken out."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.lost_device", "cuda", *names],
        cwd=ROOT,
        env={**os.environ, "CUDA_LAUNCH_BLOCKING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    good, lost, refused = json.loads(done.stdout.splitlines()[-1])
    assert (good["images"], "error" in good) == (1, False)
    for answer in (lost, refused):
        code = "RESTORE_FAILED" if names else "DEVICE_FAILED"
        assert answer["error"].startswith(f"{code}: "), answer
        assert answer["refresh_worker"] is True
        assert answer["images"] == 0
    # Of all formats together the kernel merges no weight.
    assert done.stderr.count("LORA_KERNEL=0") == (names == ("LoRA",))
