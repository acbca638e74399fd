"""Jobs in threads: the event loop stays free, a stopped job is awaited, a broken worker ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sdxl_worker.job_run import JobRun
from sdxl_worker.serving.service import Service
from sdxl_worker.serving.turns import Turns

# Only bounds a hang.
PATIENCE = 60.0


class SlowJob:
    """A job that waits to be released, notices when it is stopped, and takes its time all the same."""

    def __init__(self) -> None:
        self.started, self.release, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.was_stopped = False

    def run(self, job: dict[str, Any], run: JobRun) -> dict[str, Any]:
        self.started.set()
        assert self.release.wait(PATIENCE)
        self.was_stopped = run.should_stop()
        self.ended.set()
        return {"seed": 1, "refresh_worker": job.get("refresh")}


@pytest.fixture
def slow() -> Iterator[SlowJob]:
    job = SlowJob()
    yield job
    job.release.set()


@pytest.fixture
def service(slow: SlowJob) -> Iterator[Service]:
    turns = Turns()
    service = Service(lambda job: JobRun(job["id"], turns.ticket()), slow.run)
    yield service
    slow.release.set()
    service.close()


def test_row_52_a_stopped_job_is_awaited_however_often_it_is_stopped(slow: SlowJob, service: Service):
    async def scenario() -> None:
        task = asyncio.create_task(service.handle({"id": "a"}))
        assert await asyncio.to_thread(slow.started.wait, PATIENCE)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        slow.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.ended.is_set()

    asyncio.run(scenario())
    assert slow.was_stopped


def test_the_event_loop_is_free_while_a_job_runs(slow: SlowJob, service: Service):
    async def scenario() -> None:
        task = asyncio.create_task(service.handle({"id": "a"}))
        assert await asyncio.to_thread(slow.started.wait, PATIENCE)
        slow.release.set()
        assert (await task)["seed"] == 1

    asyncio.run(scenario())
    assert "refresh_worker" not in service.config
    assert not slow.was_stopped


def test_an_answer_that_asks_for_a_fresh_worker_ends_this_one(slow: SlowJob, service: Service):
    slow.release.set()
    asyncio.run(service.handle({"id": "a", "refresh": True}))
    assert service.config["refresh_worker"] is True


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (0, 1)])
def test_concurrency(asked, given):
    service = Service(lambda _: pytest.fail("no job"), lambda *_: {}, asked)
    assert service.config["concurrency_modifier"](1) == given
