"""The picture that a request starts from: fetched, unpacked, and whose fault it is when that fails."""

from __future__ import annotations

import base64
import os

import pytest
from PIL import Image

from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import Cancelled, FetchError, InvalidRequest
from sdxl_worker.generate.input_image import fetch_picture
from sdxl_worker.job_run import JobRun
from sdxl_worker.serving.turns import Turns
from sdxl_worker.settings import Settings
from tests.support import http_server as on
from tests.support.hostile_pictures import saved
from tests.support.http_server import FileServer


@pytest.fixture
def run() -> JobRun:
    return JobRun("job", Turns().ticket())


@pytest.fixture
def assets(tmp_path, monkeypatch) -> AssetStore:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    return AssetStore(Settings(lora_cache_dir=tmp_path))


def test_a_picture_is_fetched_and_unpacked(assets, run):
    with FileServer() as server:
        url = server.add("/a.png", on.whole(saved(Image.new("L", (8, 4), 7), "PNG")))
        picture = fetch_picture(url, assets, run, "image_url")
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (8, 4), (7, 7, 7))


def test_what_the_url_leads_to_is_the_callers_fault(assets, run):
    with FileServer() as server:
        with pytest.raises(InvalidRequest, match="image_url does not lead to a picture"):
            fetch_picture(server.add("/a.png", on.whole(b"<html>")), assets, run, "image_url")
        with pytest.raises(FetchError, match="image_url cannot be read") as caught:
            fetch_picture(server.add("/b.png", on.status(404)), assets, run, "image_url")
        assert caught.value.code == "INVALID_INPUT"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("claims", ["image/png", "text/html", ""])
def test_a_picture_may_be_brought_along(assets, run, claims: str, wrapped: bool):
    data = saved(Image.new("RGB", (80, 40), (7, 8, 9)), "JPEG", quality=100)
    encoded = (base64.encodebytes(data) if wrapped else base64.b64encode(data)).decode()
    picture = fetch_picture(f"data:{claims};base64,{encoded}", assets, run, "image")
    assert (picture.mode, picture.size) == ("RGB", (80, 40))


# Padding left out or too much, another alphabet, something between, nothing.
@pytest.mark.parametrize("body", ["QUJ", "QUI==", "QU-_", "QU\x0bJD", "QUJ%3D", "QÜJD", "A"])
def test_base64_is_taken_strictly(assets, run, body: str):
    with pytest.raises(InvalidRequest, match=r"^image is not well-formed base64$"):
        fetch_picture(f"data:image/png;base64,{body}", assets, run, "image")


def test_what_is_brought_along_is_bounded_after_decoding_too(assets, run):
    too_much = base64.b64encode(bytes(2**25 + 1)).decode()
    with pytest.raises(InvalidRequest, match="image must hold at most 33554432 bytes"):
        fetch_picture(f"data:;base64,{too_much}", assets, run, "image")


def test_sentences_name_the_field(assets, run):
    with pytest.raises(InvalidRequest, match=r"^image does not lead to "):
        fetch_picture("data:image/png;base64,", assets, run, "image")


def test_a_stop_ends_the_unpacking(assets, run, monkeypatch):
    noise = Image.frombytes("RGB", (500, 500), os.urandom(750_000))
    monkeypatch.setattr(assets, "read", lambda *_: run.cancel() or saved(noise, "PNG"))
    with pytest.raises(Cancelled):
        fetch_picture("https://a/b.png", assets, run, "image_url")
