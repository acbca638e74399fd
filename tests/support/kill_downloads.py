"""Kill downloads at every moment that can be told apart; prints what each kill left as one JSON line.

Run as `python -m tests.support.kill_downloads URL SHA256` with LORA_CACHE_DIR set. A moment is an operation on the
cache folder (Python's audit events), a connection, or a report of progress: the first child dies before its first one,
the next one before its second, until a child gets through. The children are forked from a process that has imported
everything already, so that only the download has moments.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import download_weights
from sdxl_worker.assets.sidecar import sidecar_path
from sdxl_worker.lora import file as lora_file

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.utime", "socket.connect"})
MOST_MOMENTS = 500


def download_until(url: str, folder: str, moment: int) -> int:
    """The exit status of a fork that downloads `url` and kills itself right before the operation number `moment`."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = 0

    def live_on(*_arguments: object) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect" or (event in EVENTS and any(str(value).startswith(folder) for value in arguments)):
            live_on()

    sys.addaudithook(audit)
    try:
        download_weights.download_lora(url, on_progress=live_on)
    except BaseException:
        os._exit(1)
    os._exit(0)


def look(path: Path, sha256: str) -> str:
    """What is under the final name; removed again, so that the next child downloads."""
    if not path.exists():
        return "absent"
    good = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    path.unlink()
    sidecar_path(path).unlink(missing_ok=True)
    return "whole" if good else "bad"


def main(url: str, sha256: str) -> None:
    """One child for each moment."""
    torch.set_num_threads(1)
    assert lora_file.check_lora_file is not None
    from runpod.serverless.utils import rp_ssrf

    assert rp_ssrf.safe_get is not None
    path = download_weights.get_lora_cache_path(url)
    left: list[str] = []
    status = -1
    while status != 0 and len(left) < MOST_MOMENTS:
        status = download_until(url, str(path.parent), len(left) + 1)
        assert status in (0, signal.SIGKILL), status
        left.append(look(path, sha256))
    partials = len(list((path.parent / ".partial").iterdir()))
    sys.stdout.write(json.dumps({"left": left, "status": status, "partials": partials}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
