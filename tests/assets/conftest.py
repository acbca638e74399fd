"""What the tests of fetching and of downloading share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from sdxl_worker.assets import fetch
from sdxl_worker.logs import quiet_http_libraries
from tests.support.http_server import FileServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that the guard lets pass, and retries without waiting."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    with FileServer() as running:
        yield running


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Every log line that can appear where logging is configured as the worker does it, down to DEBUG."""
    quiet_http_libraries()
    caplog.set_level(logging.DEBUG)
    return caplog
