"""Pictures go to an S3 stand-in on loopback, through the SDK's helper and the real boto3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from sdxl_worker.errors import Cancelled, UploadError
from sdxl_worker.generate.images import EncodedImage
from sdxl_worker.serving.upload import bucket_is_configured, upload
from sdxl_worker.settings import Settings

PICTURES = [EncodedImage(b"first", ".png", "image/png", 1), EncodedImage(b"second", ".jpeg", "image/jpeg", 2)]


class Bucket(ThreadingHTTPServer):
    """Keeps what is PUT; answers the codes in `codes` first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Put)
        self.codes: list[int] = []
        self.objects: dict[str, tuple[str, bytes]] = {}
        self.tries = 0


class _Put(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tries += 1
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.objects[urlsplit(self.path).path] = (self.headers["Content-Type"], body)
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "s3cret")
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
