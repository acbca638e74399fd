"""Put pictures into the S3 bucket through the SDK's upload helper."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sdxl_worker.errors import UploadError
from sdxl_worker.generate.images import EncodedImage
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

BUCKET_VARIABLES = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


# Where the start-up check's object lies while it is there.
CHECK_FOLDER = "health-check"


def bucket_is_configured(settings: Settings) -> bool:
    """True when pictures go to a bucket. Raises UploadError, naming what is missing, when only part of it is set.

    The SDK's helper would answer a half-configured bucket with a path on the worker's own disk.
    """
    values = (settings.bucket_endpoint_url, settings.bucket_access_key_id, settings.bucket_secret_access_key)
    missing = [name for name, value in zip(BUCKET_VARIABLES, values, strict=True) if not value]
    if missing and len(missing) < len(BUCKET_VARIABLES):
        raise UploadError(f"the bucket is only half configured: set {' and '.join(missing)} as well, or none of them")
    return not missing


def upload(encoded: Sequence[EncodedImage], job_id: str, before_each: Callable[[], None] = lambda: None) -> list[str]:
    """Presigned URLs (valid for a week) of the uploaded pictures, in order.

    `before_each` may raise to stop. The helper's S3 client retries each request three times; raises UploadError
    when that was not enough.
    """
    # Imported here: it sets up logging and reads the environment.
    from runpod.serverless.utils import rp_upload

    # Cloudflare R2 and some other stores refuse the checksums that boto3 adds since 1.36, R2 as "Unauthorized"; the
    # helper makes its client itself, which leaves this variable. https://github.com/cloudflare/cloudflare-docs/pull/19236
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    urls = []
    with tempfile.TemporaryDirectory(prefix="upload_") as folder:
        for index, image in enumerate(encoded):
            before_each()
            path = Path(folder) / f"{index}{image.suffix}"
            path.write_bytes(image.data)
            try:
                url = rp_upload.upload_image(job_id, str(path))
            except Exception as error:
                # botocore has some fifty unrelated exception classes; all of them mean the same here.
                raise UploadError(_sentence(error)) from error
            if not isinstance(url, str) or not url.startswith(("http://", "https://")):
                raise UploadError("the bucket gave no URL; check the BUCKET_* variables")
            urls.append(url)
    return urls


def try_upload() -> None:
    """Upload one small object the way pictures are, and delete it again; raises UploadError.

    Keys that may write and not delete do for pictures: that is only logged, and the object stays.
    """
    from runpod.serverless.utils import rp_upload

    (url,) = upload([EncodedImage(b"can this worker upload?", ".png", "image/png", 0)], CHECK_FOLDER)
    # The bucket and the name are the helper's own; the URL, which it signed for reading, ends with both.
    bucket, key = urlsplit(url).path.rsplit("/", 2)[0].rpartition("/")[2], "/".join(urlsplit(url).path.split("/")[-2:])
    try:
        client, _ = rp_upload.get_boto_client()
        client.delete_object(Bucket=bucket, Key=key)
    except Exception as error:
        logger.warning("the start-up check's %s stays in the bucket: %s", key, type(error).__name__)


def _sentence(error: Exception) -> str:
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    if status in (401, 403):
        return (
            "the bucket refused the upload: check BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY and their rights, and "
            "that BUCKET_ENDPOINT_URL names the bucket"
        )
    if status == 404:
        return (
            "the bucket does not exist: BUCKET_ENDPOINT_URL has to name it, as in "
            "https://BUCKET.s3.REGION.amazonaws.com or https://HOST/BUCKET; without that RunPod's SDK uploads to one "
            f"called {time.strftime('%m-%y')}"
        )
    if status is not None:
        return f"the bucket answered the upload with HTTP {status}, on every try"
    if isinstance(error, ValueError):
        return "BUCKET_ENDPOINT_URL is not a URL; it should look like https://BUCKET.s3.REGION.amazonaws.com"
    return "the bucket could not be reached: check BUCKET_ENDPOINT_URL"
