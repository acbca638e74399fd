"""Schedulers are the ones that their names stand for."""

from __future__ import annotations

import contextlib

import diffusers
import pytest

from sdxl_worker import topology
from sdxl_worker.generate import samplers
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import SCHEDULERS, Scheduler, scheduler_names

# The classes, of the first seven as worker-sdxl's handler gives them, and the names that A1111 shows.
EXPECTED = {
    "PNDM": (diffusers.PNDMScheduler, "PLMS"),
    "KLMS": (diffusers.LMSDiscreteScheduler, "LMS"),
    "DDIM": (diffusers.DDIMScheduler, "DDIM"),
    "K_EULER": (diffusers.EulerDiscreteScheduler, "Euler"),
    "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, "Euler a"),
    "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, "DPM++ 2M"),
    "DPMSolverSinglestep": (diffusers.DPMSolverSinglestepScheduler, "DPM++ 2S"),
    "Heun": (diffusers.HeunDiscreteScheduler, "Heun"),
    "DPM2": (diffusers.KDPM2DiscreteScheduler, "DPM2"),
    "DPM2 a": (diffusers.KDPM2AncestralDiscreteScheduler, "DPM2 a"),
    "DPM++ 2M SDE": (diffusers.DPMSolverMultistepScheduler, "DPM++ 2M SDE"),
    "DPM++ 3M SDE": (diffusers.DPMSolverMultistepScheduler, "DPM++ 3M SDE"),
    "DPM++ SDE": (diffusers.DPMSolverSDEScheduler, "DPM++ SDE"),
    "DDPM": (diffusers.DDPMScheduler, "DDPM"),
    "UniPC": (diffusers.UniPCMultistepScheduler, "UniPC"),
    "DEIS": (diffusers.DEISMultistepScheduler, "DEIS"),
    "SA-Solver": (diffusers.SASolverScheduler, "SA-Solver"),
    "LCM": (diffusers.LCMScheduler, "LCM"),
    "TCD": (diffusers.TCDScheduler, "TCD"),
}


def test_every_scheduler_is_in_this_list():
    assert scheduler_names() == tuple(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_class_and_display_name(name: str):
    scheduler_class, display_name = EXPECTED[name]
    scheduler = samplers.make_scheduler(name, topology.SCHEDULER_CONFIG)
    assert type(scheduler) is scheduler_class
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert SCHEDULERS[name].display_name == display_name


def test_options_reach_the_scheduler_even_where_the_config_lists_them_as_defaults(monkeypatch):
    resident = diffusers.DPMSolverMultistepScheduler()
    assert "use_karras_sigmas" in resident.config["_use_default_values"]
    karras = Scheduler("X", "DPMSolverMultistepScheduler", "X", {"use_karras_sigmas": True})
    monkeypatch.setattr(samplers, "SCHEDULERS", {"X": karras})
    assert samplers.make_scheduler("X", resident.config).config.use_karras_sigmas is True


def test_the_resident_scheduler_is_put_back_whatever_happens(pipeline):
    resident = pipeline.scheduler
    for failure in (RuntimeError, KeyboardInterrupt):
        with contextlib.suppress(failure), samplers.applied(pipeline, GenerationRequest("a", scheduler="DDIM")):
            assert type(pipeline.scheduler) is diffusers.DDIMScheduler
            raise failure
        assert pipeline.scheduler is resident
    with pytest.raises(KeyError), samplers.applied(pipeline, GenerationRequest("a", scheduler="nothing")):
        pass
    assert pipeline.scheduler is resident
