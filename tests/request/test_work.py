"""The limit on work, in calls of the UNet."""

from __future__ import annotations

from typing import Any

import pytest

from schemas import validate_request
from sdxl_worker.errors import InvalidRequest

LARGE = {"prompt": "a", "width": 2048, "height": 2048}
PICTURE = {"image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 64),
        ({"num_images": 2}, 32),
        ({"scheduler": "PNDM"}, 63),
        ({"scheduler": "Heun"}, 32),
        ({"scheduler": "DPM2"}, 32),
        ({"scheduler": "DPM2 a"}, 32),
        ({"scheduler": "DPM++ SDE Karras"}, 32),
        ({"scheduler": "DPM++ SDE", "width": 1024}, 64),
        # Image-to-image leaves out the first steps: of 128 and of 129 steps it runs 64.
        ({**PICTURE, "strength": 0.5}, 129),
        ({**PICTURE, "strength": 0.5, "scheduler": "Heun"}, 65),
    ],
)
def test_the_most_steps_of_a_large_picture(fields: dict[str, Any], steps: int):
    most = {**LARGE, **fields, "num_inference_steps": steps}
    assert validate_request(most).num_inference_steps == steps
    with pytest.raises(InvalidRequest, match="calls of the UNet"):
        validate_request({**most, "num_inference_steps": steps + 1})


def test_the_sentence():
    with pytest.raises(InvalidRequest) as caught:
        validate_request({**LARGE, "scheduler": "Heun", "num_inference_steps": 30, "num_images": 2})
    assert str(caught.value) == (
        "width x height x calls of the UNet x num_images is (2048 x 2048 x 59) x 2 = 494927872 and must be at most "
        "268435456"
    )


def test_a_picture_that_is_given_back_costs_nothing():
    request = validate_request({**LARGE, **PICTURE, "strength": 0, "num_inference_steps": 200, "num_images": 4})
    assert request.num_images == 4
