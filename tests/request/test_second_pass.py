"""The request's `hires`: what it may be, and what it adds up to."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request.second_pass import Hires
from sdxl_worker.request.validation import validate_request


def hires(value: Any, **fields: Any) -> Any:
    return validate_request({"prompt": "a", "hires": value, **fields})


def problem(value: Any, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        hires(value, **fields)
    return str(caught.value)


def test_without_it_nothing_changes():
    request = validate_request({"prompt": "a", "width": 640, "height": 512})
    assert request.hires is None
    assert request.final_size == (640, 512)
    assert hires(None).hires is None


def test_what_is_left_out_has_a_default():
    assert hires({}).hires == Hires(2.0, None, 0.4, "latent")
    assert hires({"steps": None, "upscaler": "lanczos"}).hires == Hires(2.0, None, 0.4, "lanczos")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "hires must be an object with scale, steps, strength, upscaler, not a list"),
        (2, "hires must be an object with scale, steps, strength, upscaler, not 2"),
        ({"scale": 3.1}, "hires.scale must be a number from 1 to 3, not 3.1"),
        ({"scale": None}, "hires.scale must be a number from 1 to 3, not null"),
        ({"scale": float("nan")}, "hires.scale must be a number from 1 to 3, not nan"),
        ({"steps": 0}, "hires.steps must be a whole number from 1 to 200, not 0"),
        ({"steps": True}, "hires.steps must be a whole number from 1 to 200, not true"),
        ({"strength": 0}, "hires.strength must be a number above 0 to 1, not 0"),
        ({"upscaler": "ESRGAN"}, "hires.upscaler must be one of latent, lanczos, not 'ESRGAN'"),
        ({"size": 2}, "hires has the unknown key 'size'; known are scale, steps, strength, upscaler"),
        ({"\ud800": 2}, r"hires has the unknown key '\ud800'; known are scale, steps, strength, upscaler"),
    ],
)
def test_what_is_wrong_is_named(value: Any, sentence: str):
    assert problem(value) == sentence


def test_every_problem_is_named_at_once_and_no_crowd_of_keys():
    assert problem({"scale": 0, "strength": 2, "x": 1}) == (
        "hires.scale must be a number from 1 to 3, not 0; hires.strength must be a number above 0 to 1, not 2; "
        "hires has the unknown key 'x'; known are scale, steps, strength, upscaler"
    )
    assert problem({f"k{index}": 1 for index in range(3000)}).count("unknown key") == 5


@pytest.mark.parametrize(
    ("scale", "size"),
    [(1, (800, 600)), (1.15, (920, 688)), (1.5, (1200, 896)), (2, (1600, 1200)), (3, (2400, 1800))],
)
def test_the_sides_are_rounded_down_to_multiples_of_8(scale: float, size: tuple[int, int]):
    assert hires({"scale": scale, "steps": 1}, width=800, height=600).final_size == size


@pytest.mark.parametrize(
    ("strength", "steps", "schedule"),
    [(0.4, 20, 50), (0.4, 28, 70), (0.3, 20, 67), (0.7, 10, 15), (1, 9, 9), (0.75, 1, 2)],
)
def test_all_steps_are_made_as_a1111_makes_them(strength: float, steps: int, schedule: int):
    assert Hires(strength=strength).schedule(steps) == schedule


def test_the_schedule_makes_exactly_the_steps_that_are_asked_for():
    # diffusers' StableDiffusionXLImg2ImgPipeline.get_timesteps
    def made(schedule: int, strength: float) -> int:
        return min(int(schedule * strength), schedule)

    wrong = [
        (percent, steps)
        for percent in range(1, 101)
        for steps in range(1, 201)
        if made(Hires(strength=percent / 100).schedule(steps), percent / 100) != steps
    ]
    assert wrong == []


def test_a_schedule_has_no_more_steps_than_the_model_was_trained_with():
    assert problem({"strength": 0.01, "steps": 20}) == (
        "hires.steps / hires.strength is 2000 and must be from 1 to 1000 with K_EULER_ANCESTRAL"
    )
    assert problem({"strength": 0.4, "steps": 28}, scheduler="LCM") == (
        "hires.steps / hires.strength is 70 and must be from 1 to 50 with LCM"
    )
    assert "must be from 1 to 1000" in problem({"strength": 5e-324, "steps": 20})
    assert hires({"strength": 0.02, "steps": 20}).hires.steps == 20


def test_the_final_size_is_bounded():
    assert hires({"scale": 3, "steps": 10}, num_inference_steps=10).final_size == (3072, 3072)
    assert problem({"scale": 2, "steps": 1}, width=2048, height=2048) == (
        "hires.scale makes 4096 x 4096 pixels and may make at most 9437184"
    )


def test_the_first_pass_has_to_draw():
    start = {"image_url": "https://example.com/a.png"}
    assert (
        problem({}, **start, strength=0) == "strength must be above 0 with image_url and hires, whose first pass it is"
    )
    assert hires({"steps": 3}, **start, strength=0.5).hires.steps == 3
    assert hires({"steps": 3}, **start, strength=0.5, extend={"left": 0}).extend is None


def test_the_limit_on_work_counts_both_passes():
    fields = {"width": 512, "height": 512, "num_inference_steps": 100}
    assert hires({"steps": 200}, **fields).hires.steps == 200
    sentence = problem({"steps": 200}, **fields, num_images=2)
    assert sentence == (
        "width x height x calls of the UNet x num_images is (512 x 512 x 100 + 1024 x 1024 x 200) x 2 = 471859200 "
        "and must be at most 268435456"
    )
    assert "(512 x 512 x 199 + 1024 x 1024 x 239) x 1" in problem({"steps": 120}, **fields, scheduler="Heun")


@pytest.mark.parametrize("field", [{"mask": "https://example.com/m.png"}, {"extend": {"left": 64}}])
def test_it_is_for_whole_pictures(field: dict[str, Any]):
    (name,) = field
    assert problem({"steps": 3}, image_url="https://example.com/a.png", **field) == (
        f"hires and {name} do not go together: its second pass draws the whole picture"
    )
