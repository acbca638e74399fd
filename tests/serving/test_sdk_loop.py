"""The SDK's job loop leaves at once on SIGTERM, and loses neither a late job nor an answer."""

import asyncio
import functools
import signal
from typing import Any

import pytest
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http
from runpod.serverless.modules.rp_scale import JobScaler

from sdxl_worker.serving.sdk_loop import leave_promptly, retry_dropped_connections, running_scaler
from tests.integration.queue_server import QueueServer

JOB = {"id": "late", "input": {}}


@pytest.fixture
def scaler(monkeypatch) -> JobScaler:
    async def make() -> JobScaler:
        return JobScaler({"handler": None})

    return asyncio.run(make())


async def never(*_: Any) -> None:
    await asyncio.Event().wait()


def test_open_requests_end_with_the_loop(scaler):
    scaler.jobs_fetcher = scaler.stop_signals_fetcher = never
    leave_promptly(scaler)

    async def scenario() -> list[Any]:
        requests = [
            asyncio.create_task(scaler.jobs_fetcher(None, 1)),
            asyncio.create_task(scaler.stop_signals_fetcher(None)),
        ]
        await asyncio.sleep(0)
        scaler.kill_worker()
        return await asyncio.wait_for(asyncio.gather(*requests), 10)

    assert asyncio.run(scenario()) == [[], []]


def test_jobs_pass_while_the_loop_is_alive(scaler):
    async def fetch(_session: Any, count: int) -> list[dict[str, Any]]:
        return [JOB] * count

    scaler.jobs_fetcher = fetch
    leave_promptly(scaler)
    leave_promptly(scaler)
    assert asyncio.run(scaler.jobs_fetcher("session", 2)) == [JOB, JOB]


def test_a_job_that_arrives_during_shutdown_is_run_and_answered(scaler):
    handled = []

    async def fetch(_session: Any, _count: int) -> list[dict[str, Any]]:
        scaler.kill_worker()
        return [JOB]

    async def handle(session: Any, config: dict[str, Any], job: dict[str, Any]) -> None:
        handled.append((session, config, job))

    scaler.jobs_fetcher, scaler.jobs_handler = fetch, handle
    leave_promptly(scaler)
    assert asyncio.run(scaler.jobs_fetcher("session", 1)) is None
    assert handled == [("session", scaler.config, JOB)]


def test_an_error_of_the_queue_passes_through(scaler):
    async def fetch(*_: Any) -> None:
        raise ConnectionError("gone")

    scaler.jobs_fetcher = fetch
    leave_promptly(scaler)
    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(scaler.jobs_fetcher(None, 1))


def test_the_running_loop_is_the_one_that_handles_sigterm(scaler):
    assert running_scaler() is None
    before = signal.signal(signal.SIGTERM, scaler.handle_shutdown)
    try:
        assert running_scaler() is scaler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("fault", ["drop", 500])
def test_an_answer_is_sent_three_times_before_it_is_lost(monkeypatch, fault):
    monkeypatch.setattr(rp_http, "FibonacciRetry", rp_http.FibonacciRetry)
    retry_dropped_connections()
    # The same tries, without the seconds in between.
    monkeypatch.setattr(rp_http, "FibonacciRetry", functools.partial(rp_http.FibonacciRetry, multiplier=0))
    with QueueServer() as queue:
        url = queue.environment("w")["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", "w")
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", url)
        queue.misbehave = lambda _kind, _job, count: fault if count <= 2 else None

        async def send() -> None:
            async with AsyncClientSession() as session:
                await rp_http.send_result(session, {"output": {"seed": 1}}, JOB)

        asyncio.run(send())
        assert queue.calls["done", "late"] == 3
        assert queue.of("done", "late")[0].body == {"output": {"seed": 1}}
