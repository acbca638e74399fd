"""What a request's sampler, schedule and steps mean together."""

from __future__ import annotations

from typing import Any

import pytest

from schemas import validate_request
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.sampling import guided_steps

SMALL = {"prompt": "a", "width": 64, "height": 64}


def valid(**fields: Any) -> GenerationRequest:
    return validate_request({**SMALL, **fields})


def problem(**fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        valid(**fields)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "scheduler", "schedule"),
    [
        ({}, "K_EULER_ANCESTRAL", "automatic"),
        ({"scheduler": "DPM++ 2M Karras"}, "DPMSolverMultistep", "karras"),
        ({"scheduler": "dpmpp_2m", "schedule_type": "karras"}, "DPMSolverMultistep", "karras"),
        ({"scheduler": "dpmpp_2m", "schedule_type": "SGM Uniform"}, "DPMSolverMultistep", "sgm_uniform"),
        ({"scheduler": "DPM++ 2M Karras", "schedule_type": "Karras"}, "DPMSolverMultistep", "karras"),
        ({"scheduler": "DPM++ 2M Karras", "schedule_type": "Automatic"}, "DPMSolverMultistep", "karras"),
        ({"schedule_type": "trailing"}, "K_EULER_ANCESTRAL", "sgm_uniform"),
    ],
)
def test_the_tables_names(fields: dict[str, str], scheduler: str, schedule: str):
    request = valid(**fields)
    assert (request.scheduler, request.schedule_type, request.warnings) == (scheduler, schedule, ())


def test_a_schedule_in_the_name_is_given():
    assert valid(scheduler="DPM++ 2M").given == {"prompt", "width", "height", "scheduler"}
    assert valid(scheduler="DPM++ 2M Karras").given == {"prompt", "width", "height", "scheduler", "schedule_type"}


def test_two_schedules():
    assert problem(scheduler="DPM++ 2M Karras", schedule_type="beta") == (
        "scheduler 'DPM++ 2M Karras' says karras and schedule_type says beta: give one of them"
    )


def test_the_nearest_sampler_is_said():
    request = valid(scheduler="DPM++ 2S a Karras")
    assert (request.scheduler, request.schedule_type) == ("DPMSolverSinglestep", "karras")
    assert request.warnings == (
        "scheduler 'DPM++ 2S a Karras' is not there: drawn with DPMSolverSinglestep (DPM++ 2S), which adds no noise "
        "between the steps",
    )


@pytest.mark.parametrize("name", ["Euler b", "DPM adaptive", "Karras"])
def test_an_unknown_sampler_is_refused_with_the_names(name: str):
    assert problem(scheduler=name) == (
        "scheduler must be one of PNDM, KLMS, DDIM, K_EULER, K_EULER_ANCESTRAL, DPMSolverMultistep, "
        "DPMSolverSinglestep, Heun, DPM2, DPM2 a, DPM++ 2M SDE, DPM++ 3M SDE, DPM++ SDE, DDPM, UniPC, DEIS, SA-Solver, "
        f"LCM, TCD, or another name for one, not '{name}'"
    )


def test_an_unknown_schedule_is_refused_with_the_names():
    assert problem(schedule_type="polyexponential") == (
        "schedule_type must be one of automatic, karras, exponential, beta, sgm_uniform, simple, normal, ddim_uniform, "
        "or another name for one, not 'polyexponential'"
    )


@pytest.mark.parametrize(
    ("scheduler", "schedule", "takes"),
    [
        ("K_EULER_ANCESTRAL", "karras", "automatic, sgm_uniform, simple, normal, ddim_uniform"),
        ("DDIM", "beta", "automatic, sgm_uniform, simple, ddim_uniform"),
        ("PNDM", "normal", "automatic, sgm_uniform, simple, ddim_uniform"),
        ("DPMSolverSinglestep", "simple", "automatic, karras, exponential, beta"),
        ("LCM", "karras", "automatic"),
        ("TCD", "sgm_uniform", "automatic"),
    ],
)
def test_what_a_sampler_cannot_do_is_said_with_what_it_can(scheduler: str, schedule: str, takes: str):
    sentence = f"scheduler {scheduler} takes schedule_type {takes}, not {schedule}"
    assert problem(scheduler=scheduler, schedule_type=schedule) == sentence
    assert problem(scheduler=f"{scheduler} {schedule}") == sentence


def test_steps():
    assert problem(scheduler="PLMS", num_inference_steps=1) == "scheduler PNDM needs num_inference_steps of at least 2"
    assert valid(scheduler="PLMS", num_inference_steps=2).num_inference_steps == 2
    for name in ("LCM", "TCD"):
        assert problem(scheduler=name, num_inference_steps=51) == (
            f"scheduler {name} takes num_inference_steps of at most 50"
        )
        assert valid(scheduler=name, num_inference_steps=50).num_inference_steps == 50
    assert problem(scheduler="Euler", schedule_type="karras", num_inference_steps=1) == (
        "schedule_type karras needs num_inference_steps of at least 2"
    )
    assert valid(scheduler="Euler", schedule_type="karras", num_inference_steps=2).schedule_type == "karras"


TAKES = "K_EULER, DPMSolverMultistep, DPMSolverSinglestep, DPM++ 2M SDE, DPM++ 3M SDE, DDPM, LCM, TCD"


def test_as_many_steps_as_timesteps():
    request = valid(scheduler="lcm", timesteps=[999, 749, 499, 249])
    assert (request.timesteps, request.num_inference_steps) == ((999, 749, 499, 249), 4)
    assert "num_inference_steps" in request.given
    assert valid(scheduler="lcm", timesteps=[999, 499], num_inference_steps=2).num_inference_steps == 2
    assert problem(scheduler="lcm", timesteps=[999, 499], num_inference_steps=4) == (
        "timesteps has 2 entries and num_inference_steps is 4: leave the latter out"
    )
    image = {"image_url": "https://a/b.png", "scheduler": "lcm"}
    assert problem(**image, timesteps=[999, 749, 499], strength=0.3) == (
        "num_inference_steps x strength must be at least 1 with image_url; strength is 0.3"
    )
    assert valid(**image, timesteps=[999, 749, 499, 249], strength=0.3).num_inference_steps == 4


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        ([], "must hold 1 to 200 entries, not 0"),
        ("999", "must be a list of whole numbers, not '999'"),
        (list(range(999, 798, -1)), "must hold 1 to 200 entries, not 201"),
        ([999, 749.0], "[1] must be a whole number from 0 to 999, not 749.0"),
        ([True], "[0] must be a whole number from 0 to 999, not true"),
        ([1000, 1], "[0] must be a whole number from 0 to 999, not 1000"),
        ([999, -1], "[1] must be a whole number from 0 to 999, not -1"),
        ([999, 499, 499], "must fall: [2] is 499 after 499"),
        ([249, 499], "must fall: [1] is 499 after 249"),
    ],
)
def test_timesteps_are_checked(timesteps: Any, sentence: str):
    for scheduler in ("lcm", "Euler a"):
        found = problem(scheduler=scheduler, timesteps=timesteps)
        assert found.startswith("timesteps")
        assert found.endswith(sentence)


def test_timesteps_are_not_for_every_sampler():
    assert problem(timesteps=[999, 499]) == (f"scheduler K_EULER_ANCESTRAL does not take timesteps; these do: {TAKES}")
    assert problem(scheduler="Euler Karras", timesteps=[999, 499]) == (
        "timesteps and schedule_type karras exclude each other: give one of them"
    )
    for name in TAKES.split(", "):
        assert valid(scheduler=name, timesteps=[999, 499]).num_inference_steps == 2


def test_what_has_no_effect_is_said():
    assert valid(scheduler="DDIM", eta=1).eta == 1
    assert valid(scheduler="TCD", eta=0, num_inference_steps=4).warnings == ()
    assert valid(eta=0.5).warnings == ("eta has no effect with scheduler K_EULER_ANCESTRAL; it is for DDIM and TCD",)
    assert valid(guidance_rescale=0.7).warnings == ()
    assert valid(guidance_rescale=0.7, guidance_scale=1).warnings == (
        "guidance_rescale has no effect where guidance_scale is at most 1",
    )


def test_guidance_that_does_not_end_is_said():
    assert valid(cfg_end=0.6).warnings == valid(cfg_end=0).warnings == valid(cfg_end=1).warnings == ()
    assert valid(cfg_end=0.6, guidance_scale=1).warnings == ("cfg_end has no effect where guidance_scale is at most 1",)
    said = ("cfg_end 0.95 has no effect in 10 steps: less than that share lies behind the last one",)
    assert valid(cfg_end=0.95, num_inference_steps=10).warnings == said
    assert valid(cfg_end=0.95, num_inference_steps=10, scheduler="Heun").warnings == said
    # PNDM makes eleven steps, and 10 / 11 lies above 0.905.
    assert valid(cfg_end=0.95, num_inference_steps=40).warnings == ()
    assert valid(cfg_end=0.95, num_inference_steps=10, hires={}).warnings == ()
    assert valid(cfg_end=0.905, num_inference_steps=10, scheduler="PNDM").warnings == ()


def test_deep_cache_in_few_steps_is_said():
    assert valid(deep_cache=3, num_inference_steps=10).warnings == valid(deep_cache=1).warnings == ()
    assert valid(deep_cache=3, num_inference_steps=9).warnings == (
        "deep_cache is for 10 steps or more: in 9 each changes much of the picture",
    )
    none = ("deep_cache has no effect in 2 steps or fewer: the first and the last are calculated whole",)
    assert valid(deep_cache=3, num_inference_steps=2).warnings == none
    assert valid(deep_cache=3, num_inference_steps=2, hires={"steps": 20}).warnings == ()
    assert problem(deep_cache=0).startswith("deep_cache must be a whole number from 1 to 10, not 0")


@pytest.mark.parametrize(
    ("steps", "share", "guided"), [(20, 0.6, 12), (4, 0.5, 2), (4, 0.51, 3), (10, 0.1 + 0.2, 3), (5, 0, 0), (5, 1, 5)]
)
def test_steps_with_guidance_are_those_before_which_less_than_the_share_lies(steps: int, share: float, guided: int):
    assert guided_steps(steps, share) == guided


@pytest.mark.parametrize(
    ("field", "value"),
    [("eta", -0.1), ("eta", 1.1), ("eta", "0"), ("guidance_rescale", 2), ("cfg_end", -0.1), ("cfg_end", 1.1)],
)
def test_ranges(field: str, value: Any):
    assert problem(**{field: value}).startswith(f"{field} must be a number from 0 to 1, not")
