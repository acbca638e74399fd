"""The Hub's answers are bounded in size, packing and time, and good ones pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import get_session

from sdxl_worker.assets.sources import hub_answers
from sdxl_worker.assets.sources.hub_answers import HEADERS, bound_answers
from sdxl_worker.errors import FetchFailed
from tests.support.http_server import FileServer, drip, endless, gzip_bomb, whole


@pytest.fixture
def client() -> Iterator[Any]:
    """An HTTP client of the library that huggingface_hub uses, bounded twice."""
    with type(get_session())(headers=HEADERS) as client:
        bound_answers(client)
        bound_answers(client)
        assert len(client.event_hooks["response"]) == 1
        yield client


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [(endless, "more than 8 MiB"), (gzip_bomb(10**7), "packs"), (drip(bytes(100), 0.01), "slowly")],
)
def test_an_answer_without_bounds_is_ended(client, server: FileServer, monkeypatch, reply, sentence):
    if sentence == "slowly":
        monkeypatch.setattr(hub_answers, "MAX_SECONDS", 0.0)
    url = server.add("/api/models/a/b", reply)
    with pytest.raises(FetchFailed, match=sentence):
        client.get(url)


def test_a_good_answer_and_a_file_pass(client, server: FileServer, monkeypatch):
    url = server.add("/api/models/a/b", whole(b"x" * 10**6))
    assert len(client.get(url).content) == 10**6
    monkeypatch.setattr(hub_answers, "MAX_BYTES", 10)
    assert len(client.get(server.add("/a/b/resolve/main/x", whole(b"x" * 1000))).content) == 1000
