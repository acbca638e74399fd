"""The worker under RunPod's SDK: an async handler whose jobs run in threads, and the SDK's configuration."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdxl_worker.job_run import JobRun
from sdxl_worker.serving.sdk_loop import leave_promptly, running_scaler

Answer = dict[str, Any]


class Service:
    """Runs jobs in as many threads as may run at once; more than one prepare while one of them holds the device."""

    def __init__(
        self, start_run: Callable[[Any], JobRun], run: Callable[[Any, JobRun], Answer], concurrency: int = 1
    ) -> None:
        """`start_run` gives what accompanies a job that has just arrived, `run` its answer."""
        self._start_run, self._run = start_run, run
        self._concurrency = max(1, concurrency)
        self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="job")
        # What runpod.serverless.start takes.
        self.config: dict[str, Any] = {"handler": self.handle, "concurrency_modifier": self._modify_concurrency}

    async def handle(self, job: dict[str, Any]) -> Answer:
        """Run the job in a thread, so that RunPod can stop it and this process keeps talking meanwhile.

        A stopped job is awaited until its thread has really ended: only then does the SDK take the next one.
        """
        run = self._start_run(job)
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(self._threads, context.run, self._run, job, run)
        stopped = False
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                stopped = True
                run.cancel()
        if stopped:
            raise asyncio.CancelledError
        answer = future.result()
        if answer.get("refresh_worker"):
            # In the answer it only asks RunPod for a fresh worker; in the configuration it also ends this process.
            self.config["refresh_worker"] = True
        return answer

    def close(self) -> None:
        """Let the threads go; a job that runs ends first."""
        self._threads.shutdown()

    def _modify_concurrency(self, _current: int) -> int:
        # The SDK calls this first of all in its running loop: the earliest moment at which that loop can be had.
        if (scaler := running_scaler()) is not None:
            leave_promptly(scaler)
        return self._concurrency
