"""Pictures as the strings of an answer, and how many bytes these may have."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.generate.infotext import NOTHING_USED
from sdxl_worker.job_run import JobRun
from sdxl_worker.request import GenerationRequest
from sdxl_worker.serving.answers import RUN_LIMIT, check_size
from sdxl_worker.serving.delivery import Delivered, deliver
from sdxl_worker.serving.mode import Mode
from sdxl_worker.serving.turns import Turns
from sdxl_worker.settings import Settings


def noise(side: int) -> Image.Image:
    """A picture that hardly compresses, as the most detailed photographs."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def delivered(pictures: list[Image.Image], room: int | None, mode: Mode = Mode.PRODUCTION, **fields) -> Delivered:
    request = GenerationRequest(prompt="a", seed=7, num_images=len(pictures), **fields)
    return deliver(pictures, request, NOTHING_USED, JobRun("job", Turns().ticket()), Settings(), mode, room)


def test_two_large_pictures_fit_an_answer_with_the_copy_of_the_first():
    # As PNG 4.2 MB each: two fit into RunPod's 10 MB, but not the copy.
    sent = delivered([noise(1024)] * 2, RUN_LIMIT, output_format="auto")
    answer = {"images": sent.images, "image_url": sent.images[0], "seed": 7, "warnings": sent.warnings}
    check_size(answer, RUN_LIMIT)
    assert sent.warnings == ["the pictures are jpeg of quality 90: as png the answer would have been too large"]
    assert Image.open(io.BytesIO(base64.b64decode(sent.images[1].partition(",")[2]))).format == "JPEG"


def test_flat_pictures_of_any_size_fit():
    sent = delivered([Image.new("RGB", (2048, 2048))] * 4, 1_000_000, output_format="png")
    assert len(json.dumps(sent.images)) < 500_000


@pytest.mark.parametrize(("share", "quality"), [(0.99, 75), (0.6, 50), (0.4, 25), (0.01, 25)])
def test_quality_goes_down_until_it_fits(share, quality):
    best = delivered([noise(256)], 10_000_000, output_format="jpeg")
    room = int(share * 2 * len(best.images[0]))
    sent = delivered([noise(256)], room, output_format="auto")
    assert sent.warnings[0].startswith(f"the pictures are jpeg of quality {quality}: ")


def test_a_format_asked_for_by_name_is_kept():
    sent = delivered([noise(64)], 10, output_format="webp")
    assert sent.images[0].startswith("data:image/webp;base64,")
    assert sent.warnings == []


def test_a_local_run_names_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = delivered([noise(64)], None, Mode.LOCAL)
    assert sent.images == ["output/job_7.png"]
    assert Image.open(tmp_path / sent.saved[0]).size == (64, 64)
