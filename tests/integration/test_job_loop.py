"""200 jobs of every kind through the SDK's own loop, while the queue drops, delays and repeats."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import LoraScale
from sdxl_worker.request.validation import validate_request
from tests.integration.conftest import ENDLESS, SMALL, Workers
from tests.integration.hasty_worker import SCRIPT
from tests.integration.queue_server import QueueServer
from tests.integration.worker_process import WorkerProcess
from tests.support.http_server import FileServer, drip

ROUNDS = 10


@dataclass(frozen=True)
class Kind:
    """A sort of job: its input, and what has to come of it: a picture, the code of an error, or nothing (stopped)."""

    fields: Any
    picture: str = ""
    error: str = ""
    stop_at: str = ""
    twice: bool = False


def kinds(files: FileServer) -> list[Kind]:
    """Twenty jobs of every kind."""
    url = files.origin
    example = "tiny-example"
    return [
        Kind(SMALL, "plain"),
        Kind({**SMALL, "loras": [{"path": example, "scale": 0.8}]}, "lora"),
        Kind({**SMALL, "prompt": None}, error="INVALID_INPUT"),
        Kind({**SMALL, "seed": 2}, "other seed"),
        Kind({**SMALL, "loras": [f"{url}/a.safetensors"]}, "lora at 1"),
        Kind(None, error="INVALID_INPUT"),
        Kind({**SMALL, "loras": [{"path": example, "scale": 0.5}, f"{url}/b.safetensors"]}, "two loras"),
        Kind({**ENDLESS, "seed": 3}, stop_at="denoising"),
        Kind(SMALL, "plain", twice=True),
        Kind({**SMALL, "loras": ["not-there"]}, error="LORA_NOT_FOUND"),
        Kind({**SMALL, "loras": [f"{url}/missing.safetensors"]}, error="LORA_NOT_FOUND"),
        Kind({**SMALL, "loras": [f"{url}/page.safetensors"]}, error="NOT_A_LORA"),
        Kind({**SMALL, "loras": [f"{url}/slow.safetensors"]}, stop_at="downloading"),
        Kind({**SMALL, "loras": [{"path": example, "scale": -1}]}, "inverted"),
        Kind({**SMALL, "loras": [{"path": example, "scale": 0}]}, "plain"),
        Kind({**SMALL, "loras": ["../outside"]}, error="LORA_REFERENCE"),
        Kind({**SMALL, "loras": [42, {"path": example, "scale": 0.8}]}, "lora", twice=True),
        Kind({**SMALL, "width": 1001, "foo": "\ud800"}, error="INVALID_INPUT"),
        Kind({**SMALL, "output_format": "webp", "preview": True}, "webp"),
        Kind({**SMALL, "seed": 2}, "other seed"),
    ]


SCALES = {"lora": 0.8, "lora at 1": 1.0, "two loras": 1.5, "inverted": -1.0}


@pytest.fixture
def expected(pipeline, engine: LoraEngine, lora_bytes: bytes, tmp_path: Path) -> dict[str, np.ndarray]:
    """The pixels of each picture, rendered in this process."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(lora_bytes)
    pictures = {}
    for name, fields in {"plain": SMALL, "other seed": {**SMALL, "seed": 2}}.items():
        pictures[name] = np.asarray(render(pipeline, validate_request(fields))[0])
    for name, scale in SCALES.items():
        engine.apply([(engine.read(path), LoraScale.uniform(scale))])
        pictures[name] = np.asarray(render(pipeline, validate_request(SMALL))[0])
        engine.restore()
    return pictures


def pixels(answer: dict[str, Any]) -> np.ndarray:
    data = answer["output"]["images"][0].partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def misbehave(kind: str, job: str, count: int) -> str | float | None:
    """Every sixth or so of each call is dropped, refused, or answered late; a second try is let through."""
    faults: dict[int, str | float] = {3: "drop", 5: 500, 7: 0.3}
    if kind == "take":
        return faults.get(count % 11)
    return faults.get(int(job.partition("-")[2]) % (17 if kind == "done" else 13)) if count == 1 else None


@dataclass(frozen=True)
class Loop:
    """A worker that has been through all jobs, and what it held in memory after a quarter of them."""

    worker: WorkerProcess
    submitted: list[tuple[str, Kind]]
    warm_bytes: int

    def of_picture(self, name: str) -> list[str]:
        """The ids of the jobs that asked for this picture."""
        return [job_id for job_id, kind in self.submitted if kind.picture == name]


@pytest.fixture(scope="module")
def loop(queue: QueueServer, workers: Workers, files: FileServer, lora_bytes: bytes) -> Loop:
    """One worker that prepares a job while another one renders."""
    files.add("/slow.safetensors", drip(lora_bytes[:2000]))
    queue.misbehave = misbehave
    submitted = []
    for kind in kinds(files) * ROUNDS:
        job_id = queue.submit(kind.fields)
        submitted.append((job_id, kind))
        if kind.twice:
            queue.submit(kind.fields, job_id=job_id)
    worker = workers.start("loop", script=SCRIPT, WORKER_CONCURRENCY="2")
    warm_bytes = 0
    for job_id, kind in submitted:
        if kind.stop_at:
            # The SDK forgets a stop signal for a job that it has taken and not started.
            queue.wait(functools.partial(queue.calls.get, ("progress", job_id)), what=f"{job_id} running")
            queue.stop_job(job_id)
            if not warm_bytes and len(queue.of("done")) > 50:
                warm_bytes = worker.resident_bytes
    answers = sum(1 + kind.twice for _, kind in submitted if not kind.stop_at)
    queue.wait(lambda: len(queue.of("done")) >= answers, what="all answers")
    return Loop(worker, submitted, warm_bytes)


def test_every_delivery_has_one_answer_of_the_right_kind(loop: Loop, queue: QueueServer, expected):
    assert len(loop.submitted) == 200
    for job_id, kind in loop.submitted:
        answers = [event.body for event in queue.of("done", job_id)]
        assert len(answers) == (0 if kind.stop_at else len(queue.of("take", job_id))), (job_id, kind)
        for answer in answers:
            if kind.error:
                assert answer["error"].startswith(f"{kind.error}: "), answer
                assert "output" not in answer
            elif kind.picture != "webp":
                difference = np.abs(pixels(answer).astype(int) - expected[kind.picture])
                assert difference.max() <= 1, (job_id, kind)


def test_plain_renders_have_the_same_bits_first_and_last(loop: Loop, queue: QueueServer, expected):
    answers = [event.body for job_id in loop.of_picture("plain") for event in queue.of("done", job_id)]
    assert len({answer["output"]["images"][0] for answer in answers}) == 1
    assert np.abs(pixels(answers[0]).astype(int) - expected["plain"]).max() <= 1


def test_no_progress_after_the_answer(loop: Loop, queue: QueueServer):
    seen = 0
    for job_id, _ in loop.submitted:
        order = [event.kind for event in queue.events if event.job == job_id and event.kind in ("progress", "done")]
        seen += order.count("progress")
        if "done" in order:
            assert order[-1] == "done", (job_id, order)
    assert seen > 50


def test_progress_names_the_stages(loop: Loop, queue: QueueServer):
    assert {"downloading", "denoising", "queued"} <= {event.body["output"]["stage"] for event in queue.of("progress")}


def test_skipped_entries_are_named(loop: Loop, queue: QueueServer):
    ids = [job_id for job_id, kind in loop.submitted if kind.picture == "lora" and kind.twice]
    for job_id in ids:
        assert queue.of("done", job_id)[0].body["output"]["warnings"][0].startswith("loras[0] was skipped")
    assert len(ids) == ROUNDS


def test_memory_is_flat(loop: Loop):
    assert loop.warm_bytes
    assert loop.worker.resident_bytes - loop.warm_bytes < 48 * 2**20


def test_the_log_has_a_line_per_job_and_no_traceback(loop: Loop):
    lines = loop.worker.lines()
    assert {line["job"] for line in lines} == {job_id for job_id, _ in loop.submitted}
    assert all(line["ms"]["total"] >= 0 for line in lines)
    assert "Traceback" not in loop.worker.text
