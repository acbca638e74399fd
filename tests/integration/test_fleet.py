"""Four workers on one queue with one cache folder; stopping, ending and killing them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ENDLESS, SMALL, Workers
from tests.integration.hasty_worker import SCRIPT
from tests.integration.queue_server import PATIENCE, QueueServer
from tests.integration.worker_process import WorkerProcess
from tests.support.http_server import FileServer, held

NAMES = ("w1", "w2", "w3", "w4")


# A worker whose first step ends with the error of a lost CUDA context.
BROKEN_DEVICE = """
import sys, handler, sdxl_worker.serving.fitness  # whose probe keeps the render that works
from sdxl_worker.generate import render
def broken(*arguments, on_step=None, **options):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
render.render = broken
sys.exit(handler.main())
"""


@dataclass(frozen=True)
class Fleet:
    """The workers by name; two more, `sick` and `broken`, start while the others are being tested."""

    processes: dict[str, WorkerProcess]


@pytest.fixture(scope="module")
def fleet(queue: QueueServer, workers: Workers) -> Fleet:
    """All workers up: each has rendered once."""
    # RUNPOD_ENDPOINT_ID makes the SDK log as it does on RunPod.
    more = {
        "w1": {"LORA_PRELOAD": "tiny-example, not-there"},
        # Its answer is refused three times, and the SDK would pause between.
        "w3": {"script": SCRIPT},
        "w4": {"RUNPOD_ENDPOINT_ID": "endpoint"},
    }
    fleet = Fleet({name: workers.start(name, **more.get(name, {})) for name in NAMES})
    for job_id in [queue.submit(SMALL, worker=name) for name in NAMES]:
        queue.answer(job_id)
    fleet.processes["sick"] = workers.start("sick", MODEL_ID="/nowhere")
    fleet.processes["broken"] = workers.start("broken", script=BROKEN_DEVICE)
    return fleet


def running(queue: QueueServer, job_id: str) -> None:
    """Wait until the job denoises."""

    def is_denoising() -> bool:
        return any(event.body["output"]["stage"] == "denoising" for event in queue.of("progress", job_id))

    queue.wait(is_denoising, what=f"{job_id} denoising")


@contextlib.contextmanager
def unfinished(queue: QueueServer, job_id: str) -> Iterator[None]:
    """Inside, the job has begun and cannot be answered: its first progress update is on its way, and has to arrive."""
    arrived, release = threading.Event(), threading.Event()

    def hold(kind: str, job: str, count: int) -> None:
        if (kind, job, count) == ("progress", job_id, 1):
            arrived.set()
            release.wait(PATIENCE)

    queue.misbehave = hold
    try:
        assert arrived.wait(PATIENCE)
        yield
    finally:
        release.set()
        queue.misbehave = lambda *_: None


def test_every_job_is_answered_once_and_each_lora_downloaded_once(fleet, queue: QueueServer, files: FileServer, cache):
    names = [f"{letter}.safetensors" for letter in "cdef"]  # the other module has its own
    ids = [
        queue.submit({**SMALL, "loras": [f"{files.origin}/{names[index % 4]}"]}, not_by=("broken",))
        for index in range(16)
    ]
    answers = [queue.answer(job_id) for job_id in ids]
    assert all(answer["output"]["loras"][0]["layers_applied"] > 100 for answer in answers)
    assert len({answer["output"]["images"][0] for answer in answers}) == 4
    assert Counter(event.job for event in queue.of("done") if event.job in ids) == Counter(ids)
    assert len({event.worker for event in queue.of("done") if event.job in ids}) > 1
    for name in names:
        assert len(files.asked(f"/{name}")) == 1, name
    assert len(list(cache.glob("*_?.safetensors"))) == 4
    assert not list(cache.glob(".partial/*"))


def test_preloaded_loras_are_ready_and_one_that_fails_is_only_logged(fleet, queue: QueueServer):
    log = fleet.processes["w1"].text
    assert "ERROR  | sdxl_worker.assets.store: preload: LORA_NOT_FOUND: " in log
    assert "output" in queue.answer(queue.submit({**SMALL, "loras": ["tiny-example"]}, worker="w1"))


def test_on_runpod_a_job_s_line_is_the_whole_message_of_one_line(fleet, queue: QueueServer):
    reference = "tiny-example"
    job_id = queue.submit({**SMALL, "loras": [reference]}, worker="w4")
    assert "output" in queue.answer(job_id)
    lines = [json.loads(line) for line in fleet.processes["w4"].text.splitlines() if line.startswith("{")]
    (message,) = [line["message"] for line in lines if line["requestId"] == job_id and line["message"].startswith("{")]
    facts = json.loads(message)
    assert (facts["job"], facts["outcome"], facts["loras"]) == (job_id, "ok", [reference])


def test_pings_and_progress_say_what_is_running_until_it_is_stopped(fleet, queue: QueueServer):
    before = queue.answer(queue.submit(SMALL, worker="w1"))["output"]["images"]
    stopped = queue.submit({**ENDLESS, "loras": ["tiny-example"], "preview": True}, worker="w1")
    queue.wait(lambda: any(event.body.get("job_id") == stopped for event in queue.of("ping")), what="a ping")

    def told() -> list[Any]:
        return [event.body["output"] for event in queue.of("progress", stopped)]

    queue.wait(lambda: len([entry for entry in told() if "preview" in entry]) > 1, what="two previews")
    queue.stop_job(stopped)
    after = queue.answer(queue.submit(SMALL, worker="w1"))["output"]["images"]
    assert after == before
    assert not queue.of("done", stopped)
    steps = [entry["step"] for entry in told() if "step" in entry]
    assert steps == sorted(set(steps))
    assert all(entry["steps"] == 200 for entry in told() if "step" in entry)
    assert any(entry.get("preview", "").startswith("data:image/jpeg;base64,") for entry in told())
    # The next job started only when the stopped one had put the weights back.
    log = fleet.processes["w1"].text
    assert log.index(f'{{"job": "{stopped}", "outcome": "CANCELLED"') < log.index(f"{stopped} | Job stopped.")


def test_a_job_stopped_while_downloading_leaves_nothing_in_the_cache(
    fleet, queue: QueueServer, files: FileServer, cache, lora_bytes: bytes
):
    release, reached = threading.Event(), threading.Event()
    files.add("/held.safetensors", held(lora_bytes, 1000, release, reached))
    stopped = queue.submit({**SMALL, "loras": [f"{files.origin}/held.safetensors"]}, worker="w2")
    assert reached.wait(PATIENCE)
    queue.stop_job(stopped)
    assert "output" in queue.answer(queue.submit(SMALL, worker="w2"))
    release.set()
    assert not queue.of("done", stopped)
    assert not list(cache.glob("*held*"))
    assert not list(cache.glob(".partial/*"))


def test_row_54_job_done_fails_three_times_and_the_worker_goes_on(fleet, queue: QueueServer):
    queue.misbehave = lambda kind, job, count: 500 if (kind, job) == ("done", lost) and count <= 3 else None
    lost = "lost-job"
    queue.submit(SMALL, worker="w3", job_id=lost)
    first = queue.answer(queue.submit(SMALL, worker="w3"))
    assert queue.calls["done", lost] == 3
    assert not queue.of("done", lost)
    assert "Failed to return job results" in fleet.processes["w3"].text
    queue.misbehave = lambda *_: None
    queue.submit(SMALL, worker="w3", job_id=lost)
    assert queue.answer(lost)["output"]["images"] == first["output"]["images"]


def test_row_51_sigterm_during_a_job_posts_its_answer_and_exits_0(fleet, queue: QueueServer):
    job_id = queue.submit(SMALL, worker="w3", job_id="ends-after-sigterm")
    with unfinished(queue, job_id):
        fleet.processes["w3"].terminate()
        assert not queue.of("done", job_id)
    assert "output" in queue.answer(job_id)
    assert fleet.processes["w3"].exit_status() == 0
    unserved = queue.submit(SMALL, worker="w3")
    assert not queue.of("take", unserved)


def test_sigterm_while_idle_exits_0_at_once_and_takes_no_job(fleet, queue: QueueServer):
    fleet.processes["w2"].terminate()
    assert fleet.processes["w2"].exit_status() == 0


def test_sigkill_during_a_job_and_another_worker_answers_it(fleet, queue: QueueServer, cache: Path, files: FileServer):
    fields = {**SMALL, "loras": ["tiny-example"]}
    job_id = queue.submit(fields, worker="w4", job_id="killed")
    with unfinished(queue, job_id):
        fleet.processes["w4"].kill()
    queue.submit(fields, worker="w1", job_id=job_id)
    assert queue.answer(job_id)["output"]["loras"][0]["name"] == "tiny-example.safetensors"
    assert len(queue.of("done", job_id)) == 1


def test_an_unhealthy_worker_says_so_to_runpod_and_exits_1(fleet: Fleet, queue: QueueServer):
    assert fleet.processes["sick"].exit_status() == 1
    (report,) = [event.body for event in queue.of("ping") if event.worker == "sick"]
    assert (report["status"], report["check"]) == ("unhealthy", "check_model")
    assert "MODEL_ID" in report["reason"]


def test_row_50_a_broken_device_is_answered_and_ends_the_process(fleet: Fleet, queue: QueueServer):
    job_id = queue.submit(SMALL, worker="broken")
    answer = queue.answer(job_id)
    assert answer["error"].startswith("DEVICE_FAILED: ")
    assert answer["stopPod"] is True
    assert fleet.processes["broken"].exit_status() == 0


def test_row_22_a_secret_in_a_reference_is_shown_nowhere(fleet, queue: QueueServer, files: FileServer):
    url = f"http://user:passw0rd@127.0.0.1:{files.server_port}/x.safetensors"
    ids = [
        queue.submit({**SMALL, "loras": [reference]}, worker="w1")
        for reference in (f"{files.origin}/none.safetensors?token=s3cret", url)
    ]
    answers = [queue.answer(job_id) for job_id in ids]
    assert [answer["error"].partition(":")[0] for answer in answers] == ["LORA_NOT_FOUND", "LORA_REFERENCE"]
    said = fleet.processes["w1"].text + repr([event.body for event in queue.events])
    assert "s3cret" not in said
    assert "passw0rd" not in said
