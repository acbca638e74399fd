"""A hundred jobs in turn through one worker: LoRAs, failures, stops and deadlines, and nothing is left of any of them.

Ten on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from sdxl_worker.job_run import Denoising, ProgressEvent
from sdxl_worker.lora import merge
from sdxl_worker.worker import Worker
from tests.gpu.conftest import CPU_AND_GPU
from tests.gpu.tiny_worker import FORMATS, TinyWorker, loras
from tests.support.http_server import FileServer, silent
from tests.support.lora_files import randn, save

JOBS = {"cpu": 10, "cuda": 100}
GPU_ALONE = (pytest.param("cuda", marks=pytest.mark.gpu),)


@dataclass(frozen=True)
class Kind:
    """A sort of job: its fields, the code of its error if it has one, and the step after which it is stopped."""

    fields: dict[str, Any]
    error: str = ""
    stop_after: int = 0


class StopsAfter:
    """Progress that stops its job after a step."""

    def __init__(self, worker: Worker, step: int) -> None:
        self.run = worker.start_run({"id": "stopped"})
        self.run.progress = self
        self._step = step

    def update(self, event: ProgressEvent) -> None:
        if isinstance(event, Denoising) and event.step == self._step:
            self.run.cancel()

    def close(self) -> None:
        """Nothing to do."""


def kinds(url: str) -> list[Kind]:
    first, second, third, fourth = FORMATS
    late = [{**loras(first)[0], "start": 0.3}, {**loras(second)[0], "end": 0.6}]
    return [
        Kind({"loras": loras(first)}),
        Kind({"loras": loras(first, second)}),
        Kind({"loras": loras(third, fourth, first, scale=-0.2)}),
        Kind({"loras": loras(*FORMATS, scale=0.2)}),
        Kind({"loras": late}),
        Kind({"loras": loras(first, "broken")}, error="BAD_FILE"),
        Kind({"loras": loras(first, "misfit")}, error="LORA_INCOMPATIBLE"),
        Kind({"loras": [*loras(first), f"{url}/never.safetensors"]}, error="FETCH_TIMEOUT"),
        Kind({"loras": late}, error="CANCELLED", stop_after=2),
        Kind({"loras": loras(first, second), "hires": {"scale": 2, "steps": 2}}, error="CANCELLED", stop_after=4),
    ]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """One file that never comes."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    with FileServer() as server:
        server.add("/never.safetensors", silent)
        yield server


def resident(device: str, folder: Path) -> TinyWorker:
    """A worker whose folder also has two files that are no use, and who waits for a third one for a moment only."""
    tiny = TinyWorker(device, folder, download_timeout=0.1)
    (folder / "broken.safetensors").write_bytes(b"\1" * 100)
    # A text encoder's width that no SDXL has.
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save(
        folder / "misfit.safetensors",
        {f"{module}.lora_up.weight": randn(32, 2), f"{module}.lora_down.weight": randn(2, 41)},
    )
    return tiny


def run(tiny: TinyWorker, kind: Kind) -> dict[str, Any]:
    """The answer to one job of this kind, which has to be the one that is due."""
    stop = StopsAfter(tiny.worker, kind.stop_after)
    answer = tiny.answer(stop.run, **kind.fields)
    assert answer.get("error", "").partition(":")[0] == kind.error, answer
    return answer


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_nothing_is_left_of_a_hundred_jobs(device: str, tmp_path: Path, server: FileServer) -> None:
    tiny = resident(device, tmp_path)
    alternate(tiny, kinds(server.origin), JOBS[device])


@pytest.mark.parametrize("device", GPU_ALONE)
def test_nor_where_the_pristine_weights_are_in_page_locked_memory(
    device: str, tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "ACTIVATION_RESERVE", 1 << 50)
    tiny = resident(device, tmp_path)
    copies: list[torch.Tensor] = []
    empty_like = torch.empty_like

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        copy = empty_like(*arguments, **options)
        if copy.is_pinned():
            copies.append(copy)
        return copy

    monkeypatch.setattr(torch, "empty_like", counted)
    alternate(tiny, kinds(server.origin), 30)
    assert len(copies) > 100


def alternate(tiny: TinyWorker, every: list[Kind], jobs: int) -> None:
    """Run `jobs` jobs in rounds of all kinds in another order; each job has to leave what it found."""
    random, bits = Random(1), tiny.bits()
    plain = tiny.pictures()
    # The first of each makes what stays for good: read files, pristine copies, the libraries' own memory.
    first = [run(tiny, kind) for kind in every]
    assert len({str(answer) for answer in first}) > len(every) - 3
    assert (tiny.bits(), tiny.pictures()) == (bits, plain)
    in_use = tiny.memory.in_use
    for _ in range(jobs // len(every)):
        for index in random.sample(range(len(every)), len(every)):
            assert run(tiny, every[index]) == first[index]
            assert tiny.bits() == bits, every[index]
        assert tiny.pictures() == plain
        assert tiny.memory.in_use == in_use
