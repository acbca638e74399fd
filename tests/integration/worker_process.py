"""A real worker: handler.py in its own process, on the tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# One thread per process: several busy processes with more are many times slower on a small machine.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def worker_environment(cache: Path, **more: str) -> dict[str, str]:
    """The tiny model offline, downloads from loopback allowed, and nothing of the caller's own RunPod settings."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "BUCKET_", "LORA_", "HF_"))
    }
    return {
        **inherited,
        **_ONE_THREAD,
        "MODEL_ID": "tiny",
        "LORA_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
        # The SDK's own checks want the internet.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class WorkerProcess:
    """Runs `python handler.py ARGUMENTS`, or `script`, in the log's folder; its output goes to `log`.

    A context manager that leaves no process behind.
    """

    def __init__(self, log: Path, environment: dict[str, str], *arguments: str, script: str = "") -> None:
        self.log = log
        program = ["-c", script] if script else [str(ROOT / "handler.py")]
        # Beside what the machine has there: without a network its packages may be.
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=log.parent,
                env={**environment, "PYTHONPATH": path},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def text(self) -> str:
        """Everything the worker has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
        """Return once the worker has written `text`; fails when it ends first."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None, self.text[-2000:]
            assert time.monotonic() < deadline, f"{text!r} did not appear within {seconds:g} s"
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        """The lines that jobs have left: each is a JSON object by itself."""
        return [json.loads(line) for line in self.text.splitlines() if line.startswith('{"job"')]

    @property
    def resident_bytes(self) -> int:
        """How much memory the worker holds right now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def exit_status(self, seconds: float = 300.0) -> int:
        """Wait for the worker to end by itself."""
        return self.process.wait(seconds)

    def terminate(self) -> None:
        """What RunPod sends when it scales down."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The hard way, the SDK's ping process included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
