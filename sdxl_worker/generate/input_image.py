"""Fetch the picture that an image-to-image request starts from."""

from __future__ import annotations

from PIL.Image import Image

from sdxl_worker.assets.fetch import fetch_bytes
from sdxl_worker.errors import AccessDenied, BadReference, FetchError, InvalidRequest, NotFound
from sdxl_worker.generate.images import MAX_INPUT_BYTES, read_input_image
from sdxl_worker.job_run import JobRun
from sdxl_worker.settings import Settings


def fetch_input_image(url: str, settings: Settings, run: JobRun) -> Image:
    """The picture at `url` as RGB, fetched through the same guard as LoRAs.

    Raises InvalidRequest for a URL that leads to no picture, Cancelled, and the guard's own errors.
    """
    with run.stage("downloading"):
        try:
            data = fetch_bytes(
                url, max_bytes=MAX_INPUT_BYTES, deadline_s=settings.download_timeout, should_stop=run.should_stop
            )
        except (NotFound, AccessDenied, BadReference) as error:
            raise InvalidRequest(f"image_url cannot be read: {error}") from error
        except FetchError as error:
            raise type(error)(f"image_url cannot be read: {error}") from error
        return read_input_image(data)
