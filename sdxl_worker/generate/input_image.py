"""Fetch the pictures that a request starts from."""

from __future__ import annotations

from PIL.Image import Image

from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import FetchError
from sdxl_worker.generate.decode import read_input_image
from sdxl_worker.generate.modes import Inputs
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import PICTURE
from sdxl_worker.request import GenerationRequest


def fetch_inputs(request: GenerationRequest, assets: AssetStore, run: JobRun) -> Inputs:
    """The pictures that the request names, by its field; raises like `fetch_input_image`."""
    urls = {"image_url": request.image_url}
    return {name: fetch_input_image(url, assets, run) for name, url in urls.items() if url}


def fetch_input_image(url: str, assets: AssetStore, run: JobRun) -> Image:
    """The picture at `url` as RGB, fetched through the same guard as LoRAs.

    Raises InvalidRequest for a file that is not a picture, FetchError with the picture's codes, and Cancelled.
    """
    with run.stage("downloading"):
        with PICTURE.own_codes():
            try:
                data = assets.read(url, PICTURE, run.should_stop)
            except FetchError as error:
                raise type(error)(f"image_url cannot be read: {error}") from error
        return read_input_image(data, run.check_stop)
