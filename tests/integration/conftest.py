"""Real workers on a local queue. Starting one takes seconds, so each is shared by the tests that can share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sdxl_worker.topology import EXAMPLE_LORA, write_example_lora
from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess, worker_environment
from tests.support.http_server import FileServer, status, whole

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
# Takes minutes unless it is stopped: whoever has seen it denoise has time to do so.
ENDLESS = {**SMALL, "width": 512, "height": 512, "num_inference_steps": 200}


@pytest.fixture(scope="session")
def lora_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A LoRA that fits the tiny model."""
    return write_example_lora(tmp_path_factory.mktemp("lora")).read_bytes()


@pytest.fixture(scope="session")
def files(lora_bytes: bytes) -> Iterator[FileServer]:
    """Serves LoRAs, one page that is none, and nothing else."""
    with FileServer() as server:
        for name in "abcdef":
            server.add(f"/{name}.safetensors", whole(lora_bytes))
        server.add("/page.safetensors", status(200, b"<html>not here</html>", content_type="text/html"))
        yield server


@pytest.fixture(scope="module")
def queue() -> Iterator[QueueServer]:
    """An empty queue."""
    with QueueServer() as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty LoRA cache folder, but for the tiny model's example."""
    return tmp_path_factory.mktemp("cache")


class Workers:
    """Starts workers on one queue and one cache folder."""

    def __init__(self, queue: QueueServer, cache: Path, logs: Path, stack: ExitStack) -> None:
        self._queue, self._cache, self._logs, self._stack = queue, cache, logs, stack

    def start(self, name: str, script: str = "", **environment: str) -> WorkerProcess:
        """A new worker, started by `script` instead of handler.py if there is one; takes jobs as soon as it is up."""
        settings = {**worker_environment(self._cache), **self._queue.environment(name), **environment}
        return self._stack.enter_context(WorkerProcess(self._logs / f"{name}.log", settings, script=script))


@pytest.fixture(scope="module")
def workers(queue: QueueServer, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Starts workers, and ends them with the module."""
    with ExitStack() as stack:
        yield Workers(queue, cache, tmp_path_factory.mktemp("logs"), stack)


__all__ = ["ENDLESS", "EXAMPLE_LORA", "SMALL", "Workers"]
