"""Start downloads in forked children and kill them at random moments; prints what was left as one JSON line.

Run as `python -m tests.support.kill_downloads URL SHA256 ROUNDS` with LORA_CACHE_DIR set. The children are forked from
a process that has imported everything already, so that a kill falls into the download and not into an import.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import download_weights
from sdxl_worker.assets.sidecar import sidecar_path
from sdxl_worker.lora import file as lora_file


def child(url: str) -> int:
    """The process id of a fork that downloads `url` and exits with 0."""
    pid = os.fork()
    if pid == 0:
        try:
            download_weights.download_lora(url)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def look(path: Path, sha256: str) -> str:
    """What is under the final name; removed again, so that the next child downloads."""
    if not path.exists():
        return "absent"
    good = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    path.unlink()
    sidecar_path(path).unlink(missing_ok=True)
    return "whole" if good else "bad"


def main(url: str, sha256: str, rounds: int) -> None:
    """One round that is left alone gives the time within which the others are killed."""
    torch.set_num_threads(1)
    assert lora_file.check_lora_file is not None
    from runpod.serverless.utils import rp_ssrf

    assert rp_ssrf.safe_get is not None
    path = download_weights.get_lora_cache_path(url)
    started = time.monotonic()
    _, status = os.waitpid(child(url), 0)
    duration = time.monotonic() - started
    seen = Counter({f"first {look(path, sha256)}": 1})
    generator = random.Random(0)
    for _ in range(rounds):
        pid = child(url)
        time.sleep(generator.uniform(0, 1.1 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen[look(path, sha256)] += 1
    sys.stdout.write(
        json.dumps({**seen, "status": status, "partials": len(list((path.parent / ".partial").iterdir()))}) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
