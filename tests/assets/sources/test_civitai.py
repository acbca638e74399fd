"""Civitai's forms against a stand-in for civitai.com: fault rows 21, 22, 28."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from download_weights import download_lora
from sdxl_worker import errors, kinds
from sdxl_worker.assets import fetch, remote_files
from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.assets.sources.civitai import CivitaiReference
from sdxl_worker.assets.sources.url import UrlReference
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, published, settings_for
from tests.support.http_server import FileServer

LORA = lora_bytes(1)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """civitai.com on loopback, for version 7 of model 5, whose file lies on another host."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    with FileServer() as server, FileServer() as storage:
        file = storage.add("/bucket/file", on.whole(LORA)) + "?X-Amz-Signature=sig-secret"
        server.add("/api/download/models/7", on.redirect(file))
        model = {"modelVersions": [{"id": 7}, {"id": 6}]}
        server.add("/api/v1/models/5", on.status(200, json.dumps(model).encode()))
        server.storage = storage  # type: ignore[attr-defined]
        yield server


def get(reference: str, site: FileServer, folder: Path, **changes: Any) -> AssetFile:
    return download_lora(reference, settings=settings_for(folder, civitai_endpoint=site.origin, **changes))


@pytest.mark.parametrize(
    "reference",
    [
        "https://civitai.com/api/download/models/7",
        "https://civitai.com/models/5?modelVersionId=7",
        "https://civitai.com/models/5/a-name?modelVersionId=7",
        "civitai:5@7",
        "urn:air:sdxl:lora:civitai:5@7",
        "civitai:5",
        "https://civitai.com/models/5",
    ],
)
def test_forms(site: FileServer, tmp_path: Path, reference: str):
    assert get(reference, site, tmp_path).path.read_bytes() == LORA
    assert get(reference, site, tmp_path).cached
    assert len(site.asked("/api/download/models/7")) == 1


def test_one_version_is_one_file_whatever_the_form(site: FileServer, tmp_path: Path):
    get("civitai:5@7", site, tmp_path)
    assert get("https://civitai.com/models/5?modelVersionId=7", site, tmp_path).cached
    assert len(published(tmp_path)) == 1


def test_the_token_is_a_header_for_civitai_alone(site: FileServer, tmp_path: Path, all_logs: pytest.LogCaptureFixture):
    get("civitai:5", site, tmp_path, civitai_api_token="civ-secret")
    get("https://civitai.com/api/download/models/7?token=own-secret", site, tmp_path / "other", civitai_api_token="x")
    assert [request.headers["authorization"] for request in site.requests] == [
        "Bearer civ-secret",
        "Bearer civ-secret",
        "Bearer own-secret",
    ]
    assert all(request.query == "" for request in site.requests)
    storage: FileServer = site.storage  # type: ignore[attr-defined]
    assert len(storage.requests) == 2
    assert all("authorization" not in request.headers for request in storage.requests)
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert not any(secret in all_logs.text + written for secret in ("civ-secret", "own-secret", "sig-secret"))


def test_a_link_to_the_operators_endpoint_is_civitai(site: FileServer, tmp_path: Path):
    first = get("civitai:5@7", site, tmp_path)
    for path in ("/api/download/models/7?token=own-secret", "/models/5?modelVersionId=7", "/models/5/name"):
        assert get(site.origin + path, site, tmp_path).path.read_bytes() == LORA
    assert get(f"{site.origin}/api/download/models/7?token=own-secret", site, tmp_path).path == first.path
    settings = settings_for(tmp_path)
    assert parse_reference("https://civitai.com/models/5", settings, kinds.LORA) == CivitaiReference(0, 5)
    assert isinstance(parse_reference(f"{site.origin}/models/5", settings, kinds.LORA), UrlReference)


def test_the_endpoint_needs_no_public_address_but_what_it_redirects_to_does(
    site: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    with pytest.raises(errors.BlockedAddress):
        get("civitai:5@7", site, tmp_path)
    assert len(site.asked("/api/download/models/7")) == 1
    site.add("/api/download/models/7", on.whole(LORA))
    assert get("civitai:5@7", site, tmp_path).path.read_bytes() == LORA


def test_the_token_stays_away_from_other_sites(site: FileServer, tmp_path: Path):
    storage: FileServer = site.storage  # type: ignore[attr-defined]
    get(f"{storage.origin}/bucket/file", site, tmp_path, civitai_api_token="civ-secret", hf_token="hf-secret")
    assert "authorization" not in storage.requests[0].headers


@pytest.mark.parametrize(
    "reply", [on.redirect("/login?returnUrl=/x", 307), on.status(401), on.status(403)], ids=["login", "401", "403"]
)
def test_a_login_page_asks_for_the_token(site: FileServer, tmp_path: Path, reply: on.Reply):
    site.add("/api/download/models/7", reply)
    with pytest.raises(errors.AccessDenied, match="CIVITAI_API_TOKEN"):
        get("civitai:5@7", site, tmp_path)
    assert len(site.requests) == 1


def test_missing_models_and_versions(site: FileServer, tmp_path: Path):
    for reference in ("civitai:5@8", "civitai:9"):
        with pytest.raises(errors.NotFound):
            get(reference, site, tmp_path)
    site.add("/api/v1/models/5", on.status(200, b'{"modelVersions": []}'))
    with pytest.raises(errors.NotFound, match="no published version"):
        get("civitai:5", site, tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b'{"modelVersions": 5}',
        b'{"modelVersions": [{"id": 1e999}]}',
        b'{"modelVersions": [{"id": "7/../x"}]}',
        b'{"modelVersions": [{"id": %s}]}' % (b"9" * 5000),
        b"[" * 100_000,
    ],
    ids=lambda answer: repr(answer[:40]),
)
def test_an_answer_that_cannot_be_read_is_the_host_s_fault(site: FileServer, tmp_path: Path, answer: bytes):
    site.add("/api/v1/models/5", on.status(200, answer))
    with pytest.raises(errors.FetchFailed, match="cannot be read"):
        get("civitai:5", site, tmp_path)


def test_a_model_page_follows_its_newest_version(site: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    newer = lora_bytes(2)
    first = get("civitai:5", site, tmp_path)
    site.add("/api/download/models/8", on.whole(newer))
    site.add("/api/v1/models/5", on.status(200, b'{"modelVersions": [{"id": 8}, {"id": 7}]}'))
    assert get("civitai:5", site, tmp_path).path.read_bytes() == LORA  # not looked up again yet
    monkeypatch.setattr(remote_files, "RECHECK_S", 0.0)
    second = get("civitai:5", site, tmp_path)
    assert (second.path, second.path.read_bytes(), second.cached) == (first.path, newer, False)


def test_options_choose_another_file_and_are_passed_on(site: FileServer, tmp_path: Path):
    get("https://civitai.com/api/download/models/7?type=Model&format=SafeTensor", site, tmp_path)
    assert site.requests[0].query == "type=Model&format=SafeTensor"
    get("civitai:5@7", site, tmp_path)
    assert len(published(tmp_path)) == 2
