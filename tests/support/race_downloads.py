"""One of several processes that want the same LoRA: says "ready", waits for a line, downloads, prints what it got.

Run as `python -m tests.support.race_downloads URL [no-locks]` with LORA_CACHE_DIR set.
"""

from __future__ import annotations

import hashlib
import json
import sys

import download_weights
from sdxl_worker.assets import locks


def main(url: str, *options: str) -> None:
    """Everything is imported before "ready", except what only a download needs; nobody loses patience."""
    locks.PATIENCE_S = 600.0
    if "no-locks" in options:
        for name in ("acquire", "release"):
            setattr(locks.FileLock, name, lambda *_arguments, **_options: None)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    file = download_weights.download_lora(url)
    found = hashlib.sha256(file.path.read_bytes()).hexdigest()
    sys.stdout.write(json.dumps({"sha256": found, "recorded": file.sha256, "cached": file.cached}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
