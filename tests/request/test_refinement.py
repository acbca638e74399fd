"""What a request asks of the refiner, and the limits on it."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.refinement import Refinement, refinement_of
from sdxl_worker.request.validation import validate_request

PICTURE = {"image_url": "https://a/b.png"}
NO_REFINER = "has no effect: this worker has no refiner"


def asked(refiner: str = "a refiner", **fields: Any) -> GenerationRequest:
    return validate_request({"prompt": "a", "num_inference_steps": 30, **fields}, refiner)


def problem(**fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        asked(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({}, None),
        ({"strength": 0.5}, None),
        ({"refiner_inference_steps": 50}, Refinement(50, None, 0.3)),
        ({"refiner_inference_steps": 50, "strength": 0.5}, Refinement(50, None, 0.5)),
        ({"refiner_inference_steps": 0}, None),
        ({"refiner_inference_steps": 0, "high_noise_frac": 0.8}, None),
        ({"refiner_inference_steps": 50, "strength": 0}, None),
        ({"high_noise_frac": 0.8}, Refinement(30, 0.8, None)),
        ({"high_noise_frac": 0.8, "refiner_inference_steps": 50}, Refinement(50, 0.8, 0.3)),
        ({"high_noise_frac": 0.8, "strength": 0.3}, Refinement(30, 0.8, 0.3)),
        ({"high_noise_frac": 0}, None),
        ({"high_noise_frac": 1, "refiner_inference_steps": 50}, Refinement(50, None, 0.3)),
        (PICTURE, None),
        ({**PICTURE, "high_noise_frac": 0.8}, None),
        ({**PICTURE, "refiner_inference_steps": 50}, Refinement(50, None, 0.3, is_alone=True)),
        ({**PICTURE, "refiner_inference_steps": 50, "high_noise_frac": 0.8}, Refinement(50, None, 0.3, is_alone=True)),
        ({**PICTURE, "mask_url": "https://a/m.png", "refiner_inference_steps": 50}, None),
    ],
)
def test_what_the_fields_ask_for(fields: dict[str, Any], plan: Refinement | None) -> None:
    assert refinement_of(asked(**fields)) == plan
    assert refinement_of(asked("", **fields)) is None


@pytest.mark.parametrize(
    ("fields", "warnings"),
    [
        ({"refiner_inference_steps": 50, "strength": 0.3}, []),
        ({"high_noise_frac": 0.8}, []),
        ({**PICTURE, "high_noise_frac": 0.8}, ["high_noise_frac has no effect with a picture to start from"]),
        (
            {"high_noise_frac": 0.8, "refiner_inference_steps": 0},
            ["high_noise_frac has no effect: refiner_inference_steps is 0"],
        ),
        ({"high_noise_frac": 1.0}, ["high_noise_frac has no effect at 0 and 1: between them the refiner takes over"]),
        (
            {**PICTURE, "mask_url": "https://a/m.png", "refiner_inference_steps": 50},
            ["refiner_inference_steps has no effect with a mask or extend"],
        ),
        ({"hires": {"scale": 1.5}, "high_noise_frac": 0.8}, ["high_noise_frac has no effect with hires"]),
        ({"strength": 0.5}, ["strength has no effect without image_url"]),
        (
            {"refiner_inference_steps": 50, "strength": 0},
            [
                "refiner_inference_steps has no effect with strength 0",
                "strength has no effect without image_url",
            ],
        ),
    ],
)
def test_what_has_no_effect_is_said(fields: dict[str, Any], warnings: list[str]) -> None:
    assert asked(**fields).warnings == tuple(warnings)


def test_without_a_refiner_both_fields_are_named() -> None:
    request = asked("", refiner_inference_steps=1000, high_noise_frac=0.8)
    assert request.warnings == (f"refiner_inference_steps {NO_REFINER}", f"high_noise_frac {NO_REFINER}")


def test_the_refiners_steps_have_the_samplers_limits() -> None:
    assert problem(refiner_inference_steps=201) == "refiner_inference_steps must be at most 200, not 201"
    assert problem(scheduler="PNDM", refiner_inference_steps=1, strength=1) == (
        "scheduler PNDM needs refiner_inference_steps of at least 2"
    )
    too_few = "refiner_inference_steps x strength must be at least 1 with the refiner"
    assert problem(refiner_inference_steps=3) == too_few
    assert problem(**PICTURE, refiner_inference_steps=3).startswith("refiner_inference_steps x strength")
    assert asked(**PICTURE, num_inference_steps=2, refiner_inference_steps=4).warnings == ()
    assert problem(high_noise_frac=0.5, refiner_inference_steps=3) == too_few
    assert asked(high_noise_frac=0.95, num_inference_steps=8).warnings == ()


@pytest.mark.parametrize(
    ("fields", "within", "beyond"),
    [
        # 2 pictures of 1024 x 1024 with 128 calls are the limit: the base model's and the refiner's together.
        ({"refiner_inference_steps": 100, "strength": 0.5}, 78, 79),
        ({"high_noise_frac": 0.75}, 128, 129),
        ({"high_noise_frac": 0.5, "refiner_inference_steps": 100}, 196, 197),
        ({"high_noise_frac": 0.5, "refiner_inference_steps": 100, "strength": 0.5}, 156, 157),
        ({**PICTURE, "refiner_inference_steps": 128, "strength": 1}, 200, None),
    ],
)
def test_the_limit_on_work_counts_both_passes(fields: dict[str, Any], within: int, beyond: int | None) -> None:
    size: dict[str, Any] = {"width": 1024, "height": 1024, "num_images": 2}
    asked(**size, **fields, num_inference_steps=within)
    if beyond is not None:
        assert "and must be at most 268435456" in problem(**size, **fields, num_inference_steps=beyond)
