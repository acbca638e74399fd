from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from sdxl_worker.assets import fetch
from sdxl_worker.assets.sources import hub
from sdxl_worker.generate import model_repo
from tests.support.http_server import FileServer
from tests.support.hub_server import Hub


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hub on loopback, with an empty cache of its client; retries without waiting."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    for module, name in ((model_repo, "RETRY_S"), (hub, "RETRY_S"), (fetch, "BACKOFF_S")):
        monkeypatch.setattr(module, name, 0.001)
    with FileServer() as server, FileServer() as cdn:
        yield Hub(server, cdn)
