"""Samplers by the names that people use."""

from __future__ import annotations

import pytest

from sdxl_worker.request.sampler_names import find_schedule, find_scheduler
from sdxl_worker.schedulers import SCHEDULERS, SCHEDULES

# AUTOMATIC1111's and Forge's names, ComfyUI's, and diffusers' classes.
NAMES = {
    "PNDM": ["PLMS", "pndm", "PNDMScheduler"],
    "KLMS": ["LMS", "lms", "k_lms", "klms", "LMSDiscreteScheduler"],
    "DDIM": ["ddim", "DDIMScheduler"],
    "K_EULER": ["Euler", "euler", "k_euler", "EulerDiscreteScheduler", "EulerDiscrete", " EULER "],
    "K_EULER_ANCESTRAL": ["Euler a", "euler_ancestral", "k_euler_a", "EulerAncestralDiscreteScheduler", "Euler-A"],
    "DPMSolverMultistep": ["DPM++ 2M", "dpmpp_2m", "k_dpmpp_2m", "DPMSolverMultistepScheduler", "dpm++2m"],
    "DPMSolverSinglestep": ["DPM++ 2S", "DPMSolverSinglestepScheduler"],
    "Heun": ["heun", "HeunDiscreteScheduler"],
    "DPM2": ["dpm_2", "KDPM2DiscreteScheduler", "k_dpm_2"],
    "DPM2 a": ["dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", "k_dpm_2_a"],
    "DPM++ 2M SDE": ["dpmpp_2m_sde", "dpmpp_2m_sde_gpu"],
    "DPM++ 3M SDE": ["dpmpp_3m_sde", "dpmpp_3m_sde_gpu"],
    "DPM++ SDE": ["dpmpp_sde", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"],
    "DDPM": ["ddpm", "DDPMScheduler"],
    "UniPC": ["uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"],
    "DEIS": ["deis", "DEISMultistepScheduler"],
    "SA-Solver": ["sa_solver", "SASolverScheduler", "SA Solver"],
    "LCM": ["lcm", "LCMScheduler"],
    "TCD": ["tcd", "TCDScheduler"],
}
ENDS = {
    "karras": ["Karras", "karras", "_karras"],
    "exponential": ["Exponential"],
    "beta": ["Beta", "beta"],
    "sgm_uniform": ["SGM Uniform", "sgm_uniform", "Trailing"],
    "simple": ["Simple"],
    "normal": ["Uniform", "normal"],
    "ddim_uniform": ["ddim_uniform", "leading"],
    "automatic": ["Automatic"],
}


def test_every_sampler_and_schedule_is_here():
    assert set(NAMES) == set(SCHEDULERS)
    assert set(ENDS) == set(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_by_all_its_names(name: str):
    for spelled in (name, *NAMES[name]):
        found = find_scheduler(spelled)
        assert found is not None, spelled
        assert (found.scheduler.name, found.schedule, found.is_nearest) == (name, None, False)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_at_the_end(name: str):
    for schedule, ends in ENDS.items():
        for end in ends:
            found = find_scheduler(f"{NAMES[name][0]} {end}")
            assert found is not None
            assert found.schedule is not None
            assert (found.scheduler.name, found.schedule.name) == (name, schedule)


@pytest.mark.parametrize("name", ENDS)
def test_a_schedule_by_all_its_names(name: str):
    for spelled in (name, *ENDS[name]):
        found = find_schedule(spelled)
        assert found is not None
        assert found.name == name


def test_the_ancestral_singlestep_is_the_nearest_there_is():
    for name in ("DPM++ 2S a", "dpmpp_2s_ancestral", "k_dpmpp_2s_a", "DPM++ 2S a Karras"):
        found = find_scheduler(name)
        assert found is not None
        assert (found.scheduler.name, found.is_nearest) == ("DPMSolverSinglestep", True)


@pytest.mark.parametrize(
    "name", ["", "Karras", "dpm_fast", "Restart", "DPM++ 9M", "Euler b", "++", "K_EULERx", "e" * 9999]
)
def test_what_is_not_a_sampler(name: str):
    assert find_scheduler(name) is None


@pytest.mark.parametrize("name", ["", "karrasx", "polyexponential", "k" * 9999])
def test_what_is_not_a_schedule(name: str):
    assert find_schedule(name) is None


def test_no_name_is_said_twice():
    said = [
        name for row in SCHEDULERS.values() for name in {row.name, row.display_name, *row.other_names, *row.nearest_to}
    ]
    assert len(said) == len(set(said))
