"""The pictures that a request starts from: fetched, or brought along as data URIs."""

from __future__ import annotations

from PIL.Image import Image

from sdxl_worker import data_uris
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import FetchError, InvalidRequest
from sdxl_worker.generate.decode import read_input_image
from sdxl_worker.generate.modes import Inputs
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import PICTURE
from sdxl_worker.request import GenerationRequest


def fetch_inputs(request: GenerationRequest, assets: AssetStore, run: JobRun) -> Inputs:
    """The pictures that the request brings, by their names in PICTURE_FIELDS; raises like `fetch_input_image`."""
    return {
        name: fetch_input_image(reference, assets, run, field) for name, (field, reference) in request.pictures.items()
    }


def fetch_input_image(reference: str, assets: AssetStore, run: JobRun, field: str = "image_url") -> Image:
    """The picture that `field` holds as a data URI, or the URL of, as RGB.

    Raises InvalidRequest for what is not a picture, FetchError with the picture's codes, and Cancelled.
    """
    with run.stage("downloading"):
        return read_input_image(_bytes_of(reference, assets, run, field), run.check_stop, field)


def _bytes_of(reference: str, assets: AssetStore, run: JobRun, field: str) -> bytes:
    """A URL is fetched through the same guard as LoRAs."""
    if data_uris.is_data_uri(reference):
        try:
            return data_uris.decoded(reference)
        except ValueError as error:
            raise InvalidRequest(f"{field} {error}") from None
    with PICTURE.own_codes():
        try:
            return assets.read(reference, PICTURE, run.should_stop)
        except FetchError as error:
            raise type(error)(f"{field} cannot be read: {error}") from error
