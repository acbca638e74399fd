"""A server of one file in a process of its own, which costs little beside who fetches it: for `bench.cache`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Sends one file with sendfile(2), so that the server costs little; /count answers how often it did."""

    protocol_version = "HTTP/1.1"
    file = Path()
    sent = 0

    def do_GET(self) -> None:
        self.close_connection = True
        if self.path == "/count":
            self._start(len(str(Handler.sent)))
            self.wfile.write(str(Handler.sent).encode())
            return
        Handler.sent += 1
        with self.file.open("rb") as content:
            self._start(os.fstat(content.fileno()).st_size)
            self.connection.sendfile(content)

    def _start(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def serve(file: Path) -> None:
    """Print the port, then serve `file` for ever."""
    Handler.file = file
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


@contextmanager
def server(file: Path) -> Iterator[str]:
    """The origin of a server process for `file`."""
    command = [sys.executable, "-m", "bench.file_server", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
