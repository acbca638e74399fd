"""Progress through the SDK: throttled, one at a time, none in flight after close."""

import base64
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from runpod.serverless.modules import rp_http, rp_progress

from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.progress import BarProgress, RunPodProgress, preview_jpeg
from tests.integration.queue_server import QueueServer


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


@pytest.fixture
def queue(monkeypatch):
    with QueueServer() as server:
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", server.environment("w")["RUNPOD_WEBHOOK_POST_OUTPUT"])
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", rp_http.JOB_DONE_URL.replace("$RUNPOD_POD_ID", "w"))
        yield server


def sent(queue: QueueServer) -> list[dict]:
    return [event.body["output"] for event in queue.of("progress")]


def test_at_most_one_a_second_and_new_stages_sooner(queue, clock):
    reporter = RunPodProgress({"id": "j"})
    steps = [
        (0.0, "denoising", 1),
        (0.5, "denoising", 2),
        (1.1, "denoising", 3),
        (1.2, "encoding", 4),
        (1.4, "encoding", 5),
    ]
    for at, stage, step in steps:
        clock.now = 100 + at
        reporter.update(stage, step=step)
        for thread in reporter._in_flight:
            thread.join(10)
    reporter.close()
    assert [(entry["stage"], entry["step"]) for entry in sent(queue)] == [
        ("denoising", 1),
        ("denoising", 3),
        ("encoding", 5),
    ]


def test_close_waits_for_the_update_on_its_way_and_takes_no_more(queue):
    arrived, release = threading.Event(), threading.Event()

    def hold(*_):
        arrived.set()
        release.wait(10)

    queue.misbehave = hold
    reporter = RunPodProgress({"id": "j"})
    reporter.update("denoising", step=1)
    assert arrived.wait(10)
    assert reporter._in_flight, "the SDK names its thread differently: close() would not wait for it"
    closer = threading.Thread(target=reporter.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    release.set()
    closer.join(10)
    assert not closer.is_alive()
    assert len(sent(queue)) == 1
    reporter.update("denoising", step=2)
    assert not any(thread.is_alive() for thread in reporter._in_flight)
    assert len(sent(queue)) == 1


def test_the_thread_that_close_waits_for_is_the_sdk_s():
    assert rp_progress._thread_target.__name__ == "_thread_target"


def test_never_two_at_a_time(queue, clock):
    release = threading.Event()
    queue.misbehave = lambda *_: release.wait(10) and None
    reporter = RunPodProgress({"id": "j"})
    for step in range(5):
        clock.now += 2
        reporter.update("denoising", step=step)
    release.set()
    reporter.close()
    assert [entry["step"] for entry in sent(queue)] == [0]


def test_values_are_made_only_when_sent_and_their_failure_is_not_the_jobs(queue, clock, caplog):
    made: list[str] = []
    reporter = RunPodProgress({"id": "j"})

    def preview() -> str:
        made.append("data:")
        return "data:"

    reporter.update("denoising", preview=preview)
    reporter.update("denoising", preview=preview)
    clock.now += 5
    reporter.close()
    assert made == ["data:"]
    broken = RunPodProgress({"id": "j"})
    broken.update("denoising", preview=lambda: 1 / 0)
    broken.close()
    assert "progress update failed" in caplog.text


def test_preview_is_a_small_jpeg_of_the_first_picture():
    latents = torch.zeros(2, 4, 8, 16)
    latents[0, 0, :, :8] = 1.0
    image = Image.open(io.BytesIO(base64.b64decode(preview_jpeg(latents).partition(",")[2])))
    assert (image.format, image.size) == ("JPEG", (16, 8))
    pixels = np.asarray(image).astype(int)
    assert (pixels[4, 2] > pixels[4, 13]).all()
    preview_jpeg(torch.full((1, 4, 2, 2), torch.nan))


def test_the_bar_shows_stage_steps_and_bytes(capsys):
    bar = BarProgress()
    bar.update("downloading", bytes=1_500_000, total_bytes=None)
    bar.update("downloading", bytes=2_000_000, total_bytes=4_000_000)
    bar.update("denoising", step=2, steps=8)
    bar.close()
    err = capsys.readouterr().err
    assert "1.5 MB" in err
    assert "2.0 of 4.0 MB" in err
    assert "2/8" in err
