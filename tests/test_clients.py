"""The README's clients, run as they stand against a stand-in for RunPod's API that needs a cold start first."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.support.readme import README, ROOT

PICTURE = b"\x89PNG not really"
DONE = {"images": ["data:image/png;base64," + base64.b64encode(PICTURE).decode()], "seed": 7}
COMMANDS = {"python": [sys.executable], "javascript": ["node"]}


class Queue(ThreadingHTTPServer):
    """Answers /runsync with IN_QUEUE, the first /status with IN_PROGRESS and the second with `last`."""

    daemon_threads = True

    def __init__(self, last: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.statuses = [{"status": "IN_QUEUE"}, {"status": "IN_PROGRESS"}, last]
        self.calls: list[tuple[str, str, str, dict[str, Any]]] = []


class Calls(BaseHTTPRequestHandler):
    server: Queue

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.server.calls.append((self.command, self.path, self.headers["Authorization"], body))
        answer = json.dumps({"id": "job-1", **self.server.statuses.pop(0)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture(params=sorted(COMMANDS))
def language(request: pytest.FixtureRequest) -> str:
    if shutil.which(COMMANDS[request.param][0]) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def started() -> Iterator[list[Queue]]:
    """The servers that a test starts; they end with it."""
    servers: list[Queue] = []
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def run(language: str, folder: Path, last: dict[str, Any], started: list[Queue]) -> tuple[Any, Queue]:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    code = re.sub(r"sleep\(2\)", "sleep(0)", code).replace("resolve, 2000", "resolve, 0")
    script = folder / {"python": "client.py", "javascript": "client.mjs"}[language]
    script.write_text(code)
    server = Queue(last)
    started.append(server)
    Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run(
        [*COMMANDS[language], str(script), str(ROOT / "examples" / "lora.json")],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "RUNPOD_API": f"http://127.0.0.1:{server.server_port}/v2",
            "ENDPOINT_ID": "endpoint",
            "RUNPOD_API_KEY": "key",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done, server


def test_a_client_waits_through_a_cold_start(language: str, tmp_path: Path, started: list[Queue]) -> None:
    done, server = run(language, tmp_path, {"status": "COMPLETED", "output": DONE}, started)
    assert done.returncode == 0, done.stderr
    assert [(method, path) for method, path, _, _ in server.calls] == [
        ("POST", "/v2/endpoint/runsync?wait=120000"),
        *[("GET", "/v2/endpoint/status/job-1")] * 2,
    ]
    assert {key for _, _, key, _ in server.calls} == {"Bearer key"}
    assert server.calls[0][3]["input"]["loras"]
    if language == "python":
        assert (tmp_path / "picture-0.png").read_bytes() == PICTURE
    else:
        assert "data:image/png" in done.stdout


def test_a_client_shows_the_workers_sentence(language: str, tmp_path: Path, started: list[Queue]) -> None:
    done, _ = run(language, tmp_path, {"status": "FAILED", "error": "NOT_A_LORA: a sentence"}, started)
    assert done.returncode != 0
    assert "NOT_A_LORA: a sentence" in done.stderr
