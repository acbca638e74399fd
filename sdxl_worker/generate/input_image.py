"""The pictures that a request starts from: fetched, or brought along as data URIs."""

from __future__ import annotations

from collections.abc import Callable

from PIL.Image import Image

from sdxl_worker import data_uris
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import FetchError, InvalidRequest
from sdxl_worker.generate import inpaint
from sdxl_worker.generate.decode import read_input_image, read_mask
from sdxl_worker.generate.modes import Inputs
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import PICTURE
from sdxl_worker.request import GenerationRequest


def fetch_inputs(request: GenerationRequest, assets: AssetStore, run: JobRun) -> Inputs:
    """The pictures that the request brings, by their names in PICTURE_FIELDS, ready to be drawn from.

    Raises like `fetch_picture`, and InvalidRequest for a mask that leaves nothing to draw.
    """
    readers = {"image_url": read_input_image, "mask_url": read_mask}
    pictures = {
        name: fetch_picture(reference, assets, run, field, readers[name])
        for name, (field, reference) in request.pictures.items()
    }
    return inpaint.made_ready(request, pictures) if request.is_inpainting else pictures


def fetch_picture(
    reference: str, assets: AssetStore, run: JobRun, field: str, read: Callable[..., Image] = read_input_image
) -> Image:
    """The picture that `field` holds as a data URI, or the URL of, as `read` gives it.

    Raises InvalidRequest for what is not a picture, FetchError with the picture's codes, and Cancelled.
    """
    with run.stage("downloading"):
        return read(_bytes_of(reference, assets, run, field), run.check_stop, field)


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
