"""Finished pictures -> the strings of the answer: encode, save in a local run, upload or wrap as data URIs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from sdxl_worker.generate.images import EncodedImage, encode, save_locally
from sdxl_worker.generate.infotext import Used, image_seed, infotext
from sdxl_worker.job_run import JobRun
from sdxl_worker.request import GenerationRequest
from sdxl_worker.serving.mode import LOCAL_OUTPUT, Mode
from sdxl_worker.serving.upload import bucket_is_configured, upload
from sdxl_worker.settings import Settings

# What `output_format` auto tries when PNG is too large: JPEG of the quality asked for, then of these below it.
LOWER_QUALITIES = (75, 50, 25)
# What the sentence about it adds to the answer, and a little more.
_WARNING_BYTES = 200


@dataclass(frozen=True)
class Delivered:
    """One string per picture (presigned URL, data URI, in a local run its path), what was saved, and warnings."""

    images: list[str]
    saved: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def deliver(
    pictures: Sequence[Image],
    request: GenerationRequest,
    used: Used,
    run: JobRun,
    settings: Settings,
    mode: Mode,
    room: int | None,
    model_hash: str = "",
) -> Delivered:
    """The pictures where the caller will look for them; raises UploadError.

    `room` is how many bytes the answer still has for data URIs: each picture's, and once more the first one's, which
    `image_url` repeats. `output_format` auto is PNG, or the best JPEG that fits when PNG does not. Nothing of this can
    be told before rendering: deflate takes a flat picture of any size down to a thousandth.
    """
    to_bucket = bucket_is_configured(settings)
    with run.stage("encoding"):
        texts = [
            infotext(request, index, settings.model_id, used, model_hash=model_hash) for index in range(len(pictures))
        ]
        encoded, warnings = _encode(pictures, request, texts, None if to_bucket else room)
    saved = save_locally(encoded, LOCAL_OUTPUT, run.job_id) if mode is Mode.LOCAL else []
    if to_bucket:
        with run.stage("uploading"):
            return Delivered(upload(encoded, run.job_id, run.check_stop), saved, warnings)
    if mode is Mode.LOCAL:
        # Nobody gets this answer but the terminal, where the SDK prints it.
        return Delivered([str(path) for path in saved], saved, warnings)
    with run.measure("encoding"):
        return Delivered([image.data_uri() for image in encoded], saved, warnings)


def _encode(
    pictures: Sequence[Image], request: GenerationRequest, texts: Sequence[str], room: int | None
) -> tuple[list[EncodedImage], list[str]]:
    for format_name, quality in _candidates(request):
        encoded = [
            encode(picture, image_seed(request, index), texts[index], format_name, quality)
            for index, picture in enumerate(pictures)
        ]
        if room is None or _data_uri_bytes(encoded) + _WARNING_BYTES <= room:
            break
    if request.output_format != "auto" or format_name == "png":
        return encoded, []
    warning = f"the pictures are {format_name} of quality {quality}: as png the answer would have been too large"
    return encoded, [warning]


def _candidates(request: GenerationRequest) -> Iterator[tuple[str, int]]:
    """Format and quality, the one to prefer first; the last one is taken whether it fits or not."""
    if request.output_format != "auto":
        yield request.output_format, request.output_quality
        return
    yield "png", request.output_quality
    yield "jpeg", request.output_quality
    for quality in LOWER_QUALITIES:
        if quality < request.output_quality:
            yield "jpeg", quality


def _data_uri_bytes(encoded: Sequence[EncodedImage]) -> int:
    return sum(image.data_uri_length for image in (*encoded, encoded[0]))
