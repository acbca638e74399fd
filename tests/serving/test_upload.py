"""Pictures go to a bucket through the SDK's helper and the real boto3: to a stand-in that fails when it is told to, and
to a real S3 server."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from sdxl_worker.errors import Cancelled, UploadError
from sdxl_worker.generate.images import EncodedImage
from sdxl_worker.job_run import Denoising, JobRun, NoProgress, ProgressEvent, Stage
from sdxl_worker.serving.fitness import UnhealthyWorker, check_bucket
from sdxl_worker.serving.service import Service
from sdxl_worker.serving.upload import bucket_is_configured, try_upload, upload
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

PICTURES = [EncodedImage(b"first", ".png", "image/png", 1), EncodedImage(b"second", ".jpeg", "image/jpeg", 2)]


class Bucket(ThreadingHTTPServer):
    """Keeps what is PUT; answers the codes in `codes` first, and each only after `before(path)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Put)
        self.codes: list[int] = []
        self.before: Callable[[str], object] = lambda _path: None
        self.objects: dict[str, tuple[str, bytes]] = {}
        self.tries = 0
        self.headers: list[str] = []


class _Put(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.before(self.path)
        self.server.tries += 1
        self.server.headers += [name.lower() for name in self.headers]
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.objects[urlsplit(self.path).path] = (self.headers["Content-Type"], body)
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


KEYS = {"BUCKET_ACCESS_KEY_ID": "key-id", "BUCKET_SECRET_ACCESS_KEY": "s3cret"}
HOST = "my-bucket.s3.eu-central-1.amazonaws.com"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    # The SDK's retries wait like this one.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    yield server
    server.shutdown()
    server.server_close()


def test_urls_in_order_with_the_right_type(bucket: Bucket):
    urls = upload(PICTURES, "job-1")
    for url, picture in zip(urls, PICTURES, strict=True):
        parts = urlsplit(url)
        assert bucket.objects[parts.path] == (picture.mime, picture.data)
        assert "/job-1/" in parts.path
        assert parse_qs(parts.query)["X-Amz-Expires"] == ["604800"]
        assert "s3cret" not in url
    # Cloudflare R2 refuses these, which boto3 adds by itself.
    assert not [name for name in bucket.headers if name.startswith(("x-amz-checksum", "x-amz-trailer", "x-amz-sdk"))]


def test_a_bad_moment_is_tried_again(bucket: Bucket):
    bucket.codes = [500, 503]
    assert len(upload(PICTURES[:1], "job-1")) == 1
    assert bucket.tries == 3


@pytest.mark.parametrize(("codes", "sentence"), [([403], "refused the upload"), ([500] * 9, "HTTP 500, on every try")])
def test_row_48_failure_is_an_error_and_never_a_path(bucket: Bucket, codes, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket.codes = codes
    with pytest.raises(UploadError, match=sentence) as caught:
        upload(PICTURES, "job-1")
    assert "s3cret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_row_48_bucket_is_down(bucket: Bucket, monkeypatch):
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UploadError, match="could not be reached: check BUCKET_ENDPOINT_URL"):
        upload(PICTURES, "job-1")


def test_row_48_half_configured():
    assert not bucket_is_configured(Settings())
    assert bucket_is_configured(
        Settings(bucket_endpoint_url="e", bucket_access_key_id="k", bucket_secret_access_key="s")
    )
    with pytest.raises(UploadError, match="set BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY as well"):
        bucket_is_configured(Settings(bucket_endpoint_url="e"))


def test_a_stopped_job_uploads_nothing(bucket: Bucket):
    def stop() -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        upload(PICTURES, "job-1", stop)
    assert not bucket.objects


@pytest.fixture(scope="module")
def moto() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server
    server.stop()


class S3:
    """A real S3 server, empty but for a bucket `my-bucket`."""

    def __init__(self, server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = server.get_host_and_port()[1]
        self._monkeypatch = monkeypatch
        requests.post(f"http://127.0.0.1:{self.port}/moto-api/reset", timeout=60).raise_for_status()
        names = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **names)
        self.client.create_bucket(Bucket="my-bucket")
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)

    def settings(self, url: str) -> Settings:
        """The operator's, with this BUCKET_ENDPOINT_URL; the SDK reads the environment."""
        self._monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        return Settings(bucket_endpoint_url=url, bucket_access_key_id="key-id", bucket_secret_access_key="s3cret")

    @property
    def keys(self) -> list[str]:
        """What my-bucket holds."""
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket="my-bucket").get("Contents", [])]


@pytest.fixture
def s3(moto: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server under its own name, and under the one that Amazon would give to my-bucket."""
    resolve = socket.getaddrinfo
    here = {HOST: "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(here.get(host, host), *rest, **more))
    return S3(moto, monkeypatch)


@pytest.mark.parametrize("form", ["http://127.0.0.1:{port}/my-bucket", f"http://{HOST}:{{port}}"])
def test_a_url_that_names_the_bucket(s3: S3, form):
    settings = s3.settings(form.format(port=s3.port))
    check_bucket(settings)
    assert s3.keys == []
    (url,) = upload(PICTURES[:1], "job-1")
    (key,) = s3.keys
    assert key.split("/")[1] == "job-1"
    assert requests.get(url, timeout=60).content == b"first"


def test_a_url_that_names_none_is_said_before_the_first_job(s3: S3):
    settings = s3.settings(f"http://127.0.0.1:{s3.port}")
    with pytest.raises(UnhealthyWorker, match=r"BUCKET_ENDPOINT_URL has to name it, as in https://BUCKET\.s3\.REGION"):
        check_bucket(settings)
    # What the SDK does without one: a bucket for the month. Where that exists, all is well.
    s3.client.create_bucket(Bucket=time.strftime("%m-%y"))
    check_bucket(settings)


def test_a_url_that_is_none(s3: S3):
    with pytest.raises(UnhealthyWorker, match="BUCKET_ENDPOINT_URL is not a URL"):
        check_bucket(s3.settings("my-bucket"))


def test_no_bucket_and_half_a_bucket():
    check_bucket(Settings())
    with pytest.raises(UnhealthyWorker, match="half configured"):
        check_bucket(Settings(bucket_endpoint_url="https://x"))


def test_keys_that_may_not_delete_do(bucket: Bucket, caplog):
    try_upload()
    (path,) = bucket.objects
    assert "/health-check/" in path
    assert "stays in the bucket" in caplog.text


class _Told(NoProgress):
    """Says when a step of denoising was reported, and whether the device was passed on before encoding began."""

    def __init__(self) -> None:
        self.denoises = threading.Event()
        self.passed_on: Callable[[], bool] = lambda: False
        self.passed_on_before_encoding = False

    def update(self, event: ProgressEvent) -> None:
        if isinstance(event, Denoising):
            self.denoises.set()
        elif event == Stage("encoding"):
            self.passed_on_before_encoding = self.passed_on()


def test_a_picture_is_encoded_and_uploaded_while_the_next_job_denoises(bucket: Bucket, pipeline, tmp_path):
    settings = {**os.environ, "MODEL_ID": "tiny", "LORA_CACHE_DIR": str(tmp_path)}
    worker = Worker(Settings.from_environment(settings))
    worker.resident.use(pipeline)
    told = {"one": _Told(), "two": _Told()}
    beside: list[bool] = []

    def before(path: str) -> None:
        if "/one/" in path:
            # Only bounds a hang.
            beside.append(told["two"].denoises.wait(30))

    def start_run(job) -> JobRun:
        run = worker.start_run(job)
        run.progress = progress = told[job["id"]]
        progress.passed_on = lambda: run.place not in worker.turns._queue
        return run

    async def both() -> list:
        service = Service(start_run, worker.run, concurrency=2)
        size = {"width": 64, "height": 64, "num_inference_steps": 2}
        jobs = [{"id": name, "input": {"prompt": name, "seed": 1, **size}} for name in told]
        try:
            return await asyncio.gather(*(service.handle(job) for job in jobs))
        finally:
            service.close()

    bucket.before = before
    answers = asyncio.run(both())
    assert beside == [True]
    assert [progress.passed_on_before_encoding for progress in told.values()] == [True, True]
    assert [answer["image_url"].startswith("http://") for answer in answers] == [True, True]
