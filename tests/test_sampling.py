"""What a request's sampler, schedule and steps mean together."""

from __future__ import annotations

from typing import Any

import pytest

from schemas import validate_request
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import GenerationRequest

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
