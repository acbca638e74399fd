"""LoRA files on their way to the device: begun before the job's turn, used once, and let go whatever happens."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_worker import topology
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.transfer import HostData, OwnStream
from sdxl_worker.request import LoraScale
from sdxl_worker.serving import faults
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from sdxl_worker.worker import Worker
from tests.support.lora_files import weight_hash

GB = 2**30
CUDA = torch.device("cuda")
SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
JOB = {"input": {**SMALL, "loras": ["tiny-example"]}}


@dataclass(eq=False)
class HostTransfer:
    """A copy in host memory, where the device is."""

    copy: Tensor
    done: list[str]

    def ready(self) -> Tensor:
        self.done.append("read")
        return self.copy

    def let_go(self) -> None:
        self.done.append("let go")


class HostSender:
    """Says when a transfer begins and what is done with its copy, and keeps none alive."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.transfers: list[weakref.ref[HostTransfer]] = []
        self.done: list[str] = []

    def send(self, data: Tensor) -> HostTransfer:
        transfer = HostTransfer(data.clone(), self.done)
        self.transfers.append(weakref.ref(transfer))
        self.begun.set()
        return transfer

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.transfers)


@pytest.fixture
def sender() -> HostSender:
    return HostSender()


@pytest.fixture
def worker(pipeline, sender, tmp_path, monkeypatch) -> Iterator[Worker]:
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(worker.settings.lora_cache_dir)
    worker.resident.use(pipeline)
    engine = LoraEngine(pipeline, GB, sender)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    yield worker
    engine.restore()


@contextlib.contextmanager
def beside(worker: Worker, sender: HostSender) -> Iterator[tuple[Any, list[dict[str, Any]], Callable[[], None]]]:
    """Inside, a job has read its LoRA and waits for another one, which `go` ends: (its run, its answers, go)."""
    first, second = worker.start_run({"id": "first"}), worker.start_run({"id": "second"})
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(worker.run(JOB, second)))

    def go() -> None:
        first.place.leave()
        thread.join(120)

    thread.start()
    try:
        assert sender.begun.wait(120)
        assert not second.place.is_first
        yield second, answers, go
    finally:
        go()


def test_a_copy_begins_while_another_job_has_the_device_and_is_used_once(worker, sender):
    rendering: list[tuple[int, list[str]]] = []
    with (
        beside(worker, sender) as (_, answers, go),
        worker.pipeline.unet.register_forward_pre_hook(lambda *_: rendering.append((sender.alive, [*sender.done]))),
    ):
        assert (sender.alive, sender.done, answers) == (1, [], [])
        go()
    assert rendering == [(0, ["read", "let go"])] * 2, "read once, and gone before the first step"
    assert answers[0]["images"] == worker.run(JOB)["images"]


def test_a_job_that_is_cancelled_while_it_waits_lets_its_copy_go(worker, sender):
    before = weight_hash(worker.pipeline)
    with beside(worker, sender) as (second, answers, go):
        assert sender.alive == 1
        second.cancel()
        go()
    assert answers[0]["error"].startswith("CANCELLED: ")
    assert sender.alive == 0
    assert weight_hash(worker.pipeline) == before


def test_a_job_that_fails_at_its_turn_lets_its_copy_go(worker, sender, monkeypatch):
    monkeypatch.setattr(worker.health, "watch", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: lost")))
    assert worker.run(JOB)["error"].startswith("DEVICE_FAILED: ")
    assert (len(sender.transfers), sender.alive) == (1, 0)


def test_a_copy_is_let_go_before_a_failed_job_s_memory_is_freed(worker, sender, monkeypatch):
    alive: list[int] = []
    monkeypatch.setattr(faults, "free_memory", lambda _error: alive.append(sender.alive))
    monkeypatch.setattr(LoraEngine, "apply", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug, say")))
    assert worker.run(JOB)["error"].startswith("INTERNAL: ")
    assert (len(sender.transfers), alive) == (1, [0])


def test_a_refused_job_sends_nothing(worker, sender):
    refused = {"input": {**SMALL, "loras": ["tiny-example", "missing"]}}
    assert worker.run(refused)["error"].startswith("LORA_NOT_FOUND: ")
    assert sender.transfers == []


def test_where_nothing_can_be_sent_ahead_the_picture_is_the_same(worker, sender, monkeypatch):
    expected = worker.run(JOB)["images"]
    monkeypatch.setattr(sender, "send", lambda _data: None)
    assert worker.run(JOB)["images"] == expected


def test_jobs_that_wait_for_one_file_share_its_copy(sender):
    data = HostData(torch.arange(9, dtype=torch.uint8))
    with data.sent_ahead(sender):
        with data.sent_ahead(sender):
            assert torch.equal(data.on(CUDA), torch.arange(9, dtype=torch.uint8))
        assert sender.alive == 1
    assert (len(sender.transfers), sender.alive) == (1, 0)


def cuda_with(patch: pytest.MonkeyPatch, unused: float, kept: float, error: Exception | None = None) -> list[int]:
    """torch.cuda says that so many GB are free, and allocating raises `error`; the sizes that were asked for."""
    asked: list[int] = []

    def empty(size: int, **_options: Any) -> Tensor:
        asked.append(size)
        raise error or AssertionError("allocated")

    patch.setattr(torch.cuda, "Stream", lambda _device: None)
    patch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(unused * GB), 80 * GB))
    patch.setattr(torch.cuda, "memory_reserved", lambda _device: int(kept * GB))
    patch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
    patch.setattr(torch, "empty", empty)
    return asked


@pytest.mark.parametrize(("unused", "kept"), [(6.9, 0.0), (1.4, 40.0)])
def test_memory_that_a_render_may_need_is_not_taken(unused, kept, monkeypatch):
    """6 GB stay for rendering; what torch keeps for it counts, but the copy has to fit beside that."""
    file = SimpleNamespace(numel=lambda: GB, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        asked = cuda_with(patch, unused, kept)
        assert OwnStream(CUDA).send(file) is None  # type: ignore[arg-type]
    assert asked == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: lost")])
def test_what_goes_wrong_before_the_turn_is_left_to_the_turn(error, monkeypatch):
    """A lost device has to show where it is watched, which refuses the jobs that come after."""
    file = SimpleNamespace(numel=lambda: GB, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        asked = cuda_with(patch, 1.6, 5.5, error)
        assert OwnStream(CUDA).send(file) is None  # type: ignore[arg-type]
    assert asked == [GB]


@pytest.mark.gpu
def test_a_copy_on_its_way_is_waited_for_by_the_stream_and_not_by_the_host() -> None:
    data = torch.randint(0, 256, (2**26,), dtype=torch.uint8).pin_memory()
    sender = OwnStream(torch.device("cuda:0"))
    assert sender._stream != torch.cuda.current_stream()
    # Its memory is kept by torch: asking the driver for more may wait for the device.
    first = sender.send(torch.zeros_like(data).pin_memory())
    assert first is not None
    first.let_go()
    del first
    with torch.cuda.stream(sender._stream):
        # About a second, so that the copy cannot have begun when it is asked for.
        torch.cuda._sleep(2 * 10**9)
    transfer = sender.send(data)
    assert transfer is not None
    copy = transfer.ready()
    assert not transfer._done.query(), "nobody waited for it yet"  # type: ignore[attr-defined]
    assert torch.equal((copy ^ 255).cpu(), data ^ 255)


@pytest.mark.gpu
def test_memory_of_a_copy_is_not_used_again_before_it_was_read() -> None:
    data = torch.randint(0, 256, (2**26,), dtype=torch.uint8).pin_memory()
    sender, other = OwnStream(torch.device("cuda:0")), torch.zeros(2**26, dtype=torch.uint8).pin_memory()
    first = sender.send(data)
    assert first is not None
    torch.cuda._sleep(2 * 10**9)
    read = first.ready() ^ 255
    first.let_go()
    del first
    # Would take the freed memory at once, and change it before the rendering stream has read it.
    second = sender.send(other)
    assert second is not None
    assert torch.equal(read.cpu(), data ^ 255)


@pytest.mark.gpu
def test_what_was_sent_ahead_merges_to_the_same_bits(tmp_path) -> None:
    pipeline = topology.build_sdxl(dtype=torch.float16, device="cuda")
    engine = LoraEngine(pipeline, GB)
    loras = [(engine.read(write_example_lora(tmp_path)), LoraScale.uniform(0.8))]
    assert loras[0][0].data.is_pinned()

    def merged() -> list[Tensor]:
        with engine.applied(loras):
            return [parameter.clone() for parameter in pipeline.unet.parameters()]

    expected = merged()
    with engine.sent_ahead(loras):
        assert loras[0][0].host_data._transfer is not None
        assert all(torch.equal(one, other) for one, other in zip(merged(), expected, strict=True))
    assert loras[0][0].host_data._transfer is None
