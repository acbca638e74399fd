"""Finished pictures -> the strings of the answer: encode, save in a local run, upload or wrap as data URIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from sdxl_worker.generate.images import EncodedImage, encode, save_locally
from sdxl_worker.generate.infotext import image_seed, infotext
from sdxl_worker.job_run import JobRun
from sdxl_worker.lora.used import UsedLora
from sdxl_worker.request import GenerationRequest
from sdxl_worker.serving.mode import LOCAL_OUTPUT, Mode
from sdxl_worker.serving.upload import bucket_is_configured, upload

if TYPE_CHECKING:
    from sdxl_worker.worker import Worker

FALLBACK_FORMAT = "jpeg"


def deliver(
    pictures: Sequence[Image], request: GenerationRequest, used: Sequence[UsedLora], run: JobRun, worker: Worker
) -> tuple[list[str], list[str]]:
    """One string per picture (presigned URL or data URI), and warnings.

    `output_format` auto is PNG, or JPEG when data URIs of PNG would exceed the answer's limit. Raises UploadError.
    """
    to_bucket = bucket_is_configured(worker.settings)
    warnings = []
    with run.stage("encoding"):
        chosen = "png" if request.output_format == "auto" else request.output_format
        encoded = _encode_all(pictures, request, used, worker, chosen)
        limit = None if to_bucket else worker.answer_limit(run.job_id)
        if request.output_format == "auto" and limit and sum(image.data_uri_length for image in encoded) > limit:
            encoded = _encode_all(pictures, request, used, worker, FALLBACK_FORMAT)
            warnings.append(f"the pictures are {FALLBACK_FORMAT}: as png the answer would have been too large")
    if worker.mode is Mode.LOCAL:
        worker.saved += save_locally(encoded, LOCAL_OUTPUT, run.job_id)
    if to_bucket:
        with run.stage("uploading"):
            return upload(encoded, run.job_id, run.check_stop), warnings
    with run.measure("encoding"):
        return [image.data_uri() for image in encoded], warnings


def _encode_all(
    pictures: Sequence[Image],
    request: GenerationRequest,
    used: Sequence[UsedLora],
    worker: Worker,
    format_name: str,
) -> list[EncodedImage]:
    model_id = worker.settings.model_id
    return [
        encode(
            picture,
            image_seed(request, index),
            infotext(request, index, model_id, used),
            format_name,
            request.output_quality,
        )
        for index, picture in enumerate(pictures)
    ]
