"""RunPod's side of a serverless worker on loopback: job-take, job-done, job-stop, stream and ping.

The SDK's modules/rp_job.py, rp_http.py, rp_scale.py and rp_ping.py are the description that this follows.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

# Bounds a hang.
PATIENCE = 300.0
# How long a request for jobs or stop signals is held open.
HOLD_SECONDS = 5.0
_PATH = re.compile(r"/v2/test/(?P<call>[a-z-]+)/(?P<worker>[^/]+)(?:/(?P<job>[^/]+))?")


@dataclass(frozen=True)
class Event:
    """One thing that happened, in the order in which it did. `kind`: take, progress, done, stop, stream, ping."""

    kind: str
    worker: str
    job: str = ""
    body: Any = None
    at: float = field(default_factory=time.monotonic)


@dataclass
class QueuedJob:
    """A job that waits, and who may take it: `worker` ("" = anyone), but none of `not_by`."""

    job_id: str
    payload: dict[str, Any]
    worker: str = ""
    not_by: tuple[str, ...] = ()

    def is_for(self, worker: str) -> bool:
        """True when `worker` may take it."""
        return self.worker in ("", worker) and worker not in self.not_by


class QueueServer(ThreadingHTTPServer):
    """A context manager. `misbehave(kind, job id, number of the call)` may wait, or return "drop", 500 or seconds.

    Waits only bound a hang: they are long enough for eight workers on one busy core.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.changed = threading.Condition()
        self.events: list[Event] = []
        self.calls: dict[tuple[str, str], int] = {}
        self.misbehave: Callable[[str, str, int], str | float | None] = lambda kind, job, count: None
        self._waiting: deque[QueuedJob] = deque()
        self._stops: dict[str, list[str]] = {}
        self._submitted = 0
        self._closing = False
        self._thread = threading.Thread(target=lambda: self.serve_forever(poll_interval=0.05), daemon=True)

    def __enter__(self) -> QueueServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A worker that goes away is not an error of the test."""

    def environment(self, worker: str) -> dict[str, str]:
        """What RunPod sets for a worker of this queue."""
        base = f"http://127.0.0.1:{self.server_port}/v2/test"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": "test-key",
            "RUNPOD_POD_ID": worker,
        }

    def submit(self, job_input: Any, *, worker: str = "", not_by: tuple[str, ...] = (), job_id: str = "") -> str:
        """Queue a job (again, when the id is an old one) and return its id."""
        with self.changed:
            self._submitted += 1
            job_id = job_id or f"job-{self._submitted}"
            self._waiting.append(QueuedJob(job_id, {"id": job_id, "input": job_input}, worker, not_by))
            self.changed.notify_all()
        return job_id

    def stop_job(self, job_id: str) -> None:
        """Signal the worker that took the job to stop it."""
        taken = next(event for event in reversed(self.events) if (event.kind, event.job) == ("take", job_id))
        with self.changed:
            self._stops.setdefault(taken.worker, []).append(job_id)
            self.changed.notify_all()

    def note(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def count_call(self, kind: str, job: str) -> int:
        with self.changed:
            self.calls[kind, job] = count = self.calls.get((kind, job), 0) + 1
            return count

    def wait(self, condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "the condition") -> Any:
        """The first true value of `condition`, which is asked whenever something happens."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not (value := condition()):
                left = deadline - time.monotonic()
                assert left > 0, f"{what} did not come true within {seconds:g} s"
                self.changed.wait(min(left, 0.5))
        return value

    def of(self, kind: str, job_id: str | None = None) -> list[Event]:
        """The events of a kind (and a job), oldest first."""
        return [event for event in self.events if event.kind == kind and job_id in (None, event.job)]

    def answer(self, job_id: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """The first final answer to a job."""
        return self.wait(lambda: self.of("done", job_id), seconds, f"an answer to {job_id}")[0].body

    def take(self, worker: str, count: int, is_gone: Callable[[], bool]) -> list[QueuedJob]:
        """Up to `count` jobs for `worker`; waits for the first, and gives none to a worker that hung up."""
        deadline = time.monotonic() + HOLD_SECONDS
        with self.changed:
            while not self._closing and time.monotonic() < deadline:
                if is_gone():
                    return []
                chosen = [job for job in self._waiting if job.is_for(worker)][:count]
                if chosen:
                    for job in chosen:
                        self._waiting.remove(job)
                        self.events.append(Event("take", worker, job.job_id))
                    self.changed.notify_all()
                    return chosen
                self.changed.wait(0.1)
        return []

    def stops_for(self, worker: str, is_gone: Callable[[], bool]) -> list[str]:
        deadline = time.monotonic() + HOLD_SECONDS
        with self.changed:
            while not self._closing and not is_gone() and time.monotonic() < deadline:
                if stops := self._stops.pop(worker, []):
                    return stops
                self.changed.wait(0.1)
        return []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QueueServer

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        call, worker, _ = self._parts()
        if call in ("job-take", "job-take-batch"):
            count = int(parse_qs(urlsplit(self.path).query).get("batch_size", ["1"])[0])
            if self._misbehaved("take", worker):
                return
            jobs = [job.payload for job in self.server.take(worker, count, self._is_gone)]
            self._reply(204 if not jobs else 200, jobs if call == "job-take-batch" else next(iter(jobs), None))
        elif call == "job-stop":
            stops = self.server.stops_for(worker, self._is_gone)
            self._reply(200 if stops else 204, {"jobsToStop": stops})
        elif call == "ping":
            query = parse_qs(urlsplit(self.path).query)
            self.server.note(Event("ping", worker, body={name: values[0] for name, values in query.items()}))
            self._reply(200, {})
        else:
            self._reply(404, {})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call, worker, job = self._parts()
        # json.loads takes NaN, which is not JSON.
        body = json.loads(raw.decode("utf-8"), parse_constant=lambda name: f"not JSON: {name}")
        is_progress = call == "job-done" and isinstance(body, dict) and body.get("status") == "IN_PROGRESS"
        kind = "stream" if call == "job-stream" else "progress" if is_progress else "done"
        if not self._misbehaved(kind, job):
            self.server.note(Event(kind, worker, job, body))
            self._reply(200, {})

    def _parts(self) -> tuple[str, str, str]:
        found = _PATH.fullmatch(urlsplit(self.path).path)
        assert found, self.path
        return found["call"], found["worker"], found["job"] or ""

    def _misbehaved(self, kind: str, job: str) -> bool:
        """Do what the test asked for; True when there is nothing left to answer."""
        fault = self.server.misbehave(kind, job, self.server.count_call(kind, job))
        if fault == "drop":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if fault == 500:
            self._reply(500, {"error": "the queue is not well"})
            return True
        if isinstance(fault, float):
            threading.Event().wait(fault)
        return False

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _reply(self, code: int, body: Any) -> None:
        content = b"" if code == 204 else json.dumps(body).encode()
        self.send_response(code)
        if code != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
