"""Progress through the SDK: throttled, one at a time, none in flight after close."""

import threading

import pytest
from runpod.serverless.modules import rp_http

from sdxl_worker.job_run import Denoising, Downloading, ProgressEvent, Stage
from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.progress import BarProgress, RunPodProgress
from tests.integration.queue_server import QueueServer

# Only bounds a hang.
PATIENCE = 60.0


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


def landed(reporter: RunPodProgress) -> None:
    """Wait for the update on its way, if there is one."""
    if reporter._in_flight is not None:
        reporter._in_flight.join(PATIENCE)


def sent(queue: QueueServer) -> list[dict]:
    return [event.body["output"] for event in queue.of("progress")]


def test_at_most_one_a_second_and_new_stages_sooner(queue, clock):
    reporter = RunPodProgress({"id": "j"})
    events: list[tuple[float, ProgressEvent]] = [
        (0.0, Denoising(1, 8)),
        (0.5, Denoising(2, 8)),
        (1.1, Denoising(3, 8)),
        (1.2, Stage("encoding")),
        (1.4, Stage("encoding")),
        (1.7, Stage("uploading")),
    ]
    for at, event in events:
        clock.now = 100 + at
        reporter.update(event)
        landed(reporter)
    reporter.close()
    assert sent(queue) == [
        {"stage": "denoising", "step": 1, "steps": 8},
        {"stage": "denoising", "step": 3, "steps": 8},
        {"stage": "encoding"},
        {"stage": "uploading"},
    ]


def test_close_waits_for_the_update_on_its_way_and_takes_no_more(queue, monkeypatch):
    release = threading.Event()
    queue.misbehave = lambda *_: release.wait(PATIENCE) and None
    reporter = RunPodProgress({"id": "j"})
    reporter.update(Denoising(1, 8))
    thread = reporter._in_flight
    assert thread is not None

    def join(timeout: float) -> None:
        assert thread.is_alive()
        release.set()
        threading.Thread.join(thread, timeout)

    monkeypatch.setattr(thread, "join", join)
    reporter.close()
    assert not thread.is_alive()
    assert len(sent(queue)) == 1
    reporter.update(Denoising(2, 8))
    assert reporter._in_flight is thread


def test_never_two_at_a_time(queue, clock):
    release = threading.Event()
    queue.misbehave = lambda *_: release.wait(PATIENCE) and None
    reporter = RunPodProgress({"id": "j"})
    for step in range(5):
        clock.now += 2
        reporter.update(Denoising(step, 8))
    release.set()
    reporter.close()
    assert [entry["step"] for entry in sent(queue)] == [0]


def test_a_preview_is_begun_only_when_it_is_sent(queue, clock):
    begun: list[int] = []
    reporter = RunPodProgress({"id": "j"})
    for step in (1, 2):

        def begin(step: int = step):
            begun.append(step)
            return lambda: f"picture {step}"

        reporter.update(Denoising(step, 8, begin))
    reporter.close()
    assert begun == [1]
    assert sent(queue) == [{"stage": "denoising", "step": 1, "steps": 8, "preview": "picture 1"}]


def test_the_run_does_not_wait_for_a_preview(queue, clock):
    release = threading.Event()
    reporter = RunPodProgress({"id": "j"})

    def finish() -> str:
        release.wait(PATIENCE)
        return "picture"

    for step in (1, 2, 3):
        clock.now += 2
        reporter.update(Denoising(step, 8, lambda: finish))
    assert sent(queue) == []
    release.set()
    landed(reporter)
    clock.now += 2
    reporter.update(Denoising(4, 8))
    reporter.close()
    assert [(entry["step"], entry.get("preview")) for entry in sent(queue)] == [(1, "picture"), (4, None)]


def test_a_preview_that_the_job_s_end_overtakes_is_not_sent(queue, monkeypatch):
    release = threading.Event()
    reporter = RunPodProgress({"id": "j"})
    reporter.update(Denoising(1, 8, lambda: lambda: str(release.wait(PATIENCE))))
    thread = reporter._in_flight
    assert thread is not None

    def join(timeout: float) -> None:
        release.set()
        threading.Thread.join(thread, timeout)

    monkeypatch.setattr(thread, "join", join)
    reporter.close()
    assert not thread.is_alive()
    assert sent(queue) == []


@pytest.mark.parametrize("preview", [lambda: 1 / 0, lambda: lambda: str(1 / 0)], ids=["begun", "finished"])
def test_a_preview_that_fails_is_the_last_and_leaves_the_rest_of_the_update(queue, clock, preview, caplog):
    reporter = RunPodProgress({"id": "j"})
    for step, of_step in ((1, preview), (2, lambda: lambda: "picture")):
        clock.now += 2
        reporter.update(Denoising(step, 8, of_step))
        landed(reporter)
    reporter.close()
    assert sent(queue) == [{"stage": "denoising", "step": step, "steps": 8} for step in (1, 2)]
    assert caplog.text.count("a preview failed") == 1


def test_the_bar_shows_stage_steps_and_bytes(capsys):
    bar = BarProgress()
    for event in (
        Stage("downloading"),
        Downloading(1_500_000, None),
        Downloading(2_000_000, 4_000_000),
        Denoising(2, 8),
        Stage("encoding"),
    ):
        bar.update(event)
    bar.close()
    shown = list(dict.fromkeys(line.strip() for line in capsys.readouterr().err.split("\r") if line.strip()))
    assert shown[0] == "downloading"
    assert shown[1].endswith("1.5 MB")
    assert shown[2].endswith("2.0 of 4.0 MB")
    assert shown[3].startswith("denoising:  25%")
    assert "2/8" in shown[3]
    assert shown[4].startswith("encoding")
