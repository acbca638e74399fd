"""Finished pictures -> the strings of the answer: encode, save in a local run, upload or wrap as data URIs."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image

from sdxl_worker.job.images import EncodedImage, encode, save_locally
from sdxl_worker.job.infotext import UsedLora, image_seed, infotext
from sdxl_worker.job.jobs import JobRun
from sdxl_worker.job.resident import LOCAL_OUTPUT, Mode, Resident
from sdxl_worker.job.upload import bucket_is_configured, upload
from sdxl_worker.request import GenerationRequest

FALLBACK_FORMAT = "jpeg"


def deliver(
    pictures: Sequence[Image], request: GenerationRequest, used: Sequence[UsedLora], run: JobRun, resident: Resident
) -> tuple[list[str], list[str]]:
    """One string per picture (presigned URL or data URI), and warnings.

    `output_format` auto is PNG, or JPEG when data URIs of PNG would exceed the answer's limit. Raises UploadError.
    """
    to_bucket = bucket_is_configured(resident.settings)
    warnings = []
    with run.stage("encoding"):
        chosen = "png" if request.output_format == "auto" else request.output_format
        encoded = _encode_all(pictures, request, used, resident, chosen)
        limit = None if to_bucket else resident.answer_limit(run.job_id)
        if request.output_format == "auto" and limit and sum(image.data_uri_length for image in encoded) > limit:
            encoded = _encode_all(pictures, request, used, resident, FALLBACK_FORMAT)
            warnings.append(f"the pictures are {FALLBACK_FORMAT}: as png the answer would have been too large")
    if resident.mode is Mode.LOCAL:
        resident.saved += save_locally(encoded, LOCAL_OUTPUT, run.job_id)
    if to_bucket:
        with run.stage("uploading"):
            return upload(encoded, run.job_id, run.check_stop), warnings
    with run.measure("encoding"):
        return [image.data_uri() for image in encoded], warnings


def _encode_all(
    pictures: Sequence[Image],
    request: GenerationRequest,
    used: Sequence[UsedLora],
    resident: Resident,
    format_name: str,
) -> list[EncodedImage]:
    model_id = resident.settings.model_id
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
