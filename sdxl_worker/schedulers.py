"""Two tables: the samplers and the noise schedules of a request, what diffusers calls them, and what holds for each.

Pure data. https://huggingface.co/docs/diffusers/api/schedulers/overview says which class and which options are which
sampler and schedule of AUTOMATIC1111.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Schedule:
    """A value of the request's `schedule_type`: which noise levels the steps go through.

    `options` are keyword arguments for the scheduler, `other_names` what else it is called; `min_steps` is the least
    num_inference_steps that gives a range of noise levels at all.
    """

    name: str
    display_name: str
    options: Mapping[str, Any] = field(default_factory=lambda: NO_OPTIONS)
    other_names: tuple[str, ...] = ()
    min_steps: int = 1


def _levels(option: str) -> Mapping[str, Any]:
    # Between the highest and the lowest level that linspace reaches: those of the model, as in A1111 and ComfyUI.
    return {"timestep_spacing": "linspace", option: True}


_SCHEDULES = (
    # The checkpoint's own.
    Schedule(AUTOMATIC, "Automatic"),
    Schedule("karras", "Karras", _levels("use_karras_sigmas"), min_steps=2),
    Schedule("exponential", "Exponential", _levels("use_exponential_sigmas"), min_steps=2),
    Schedule("beta", "Beta", _levels("use_beta_sigmas"), min_steps=2),
    Schedule("sgm_uniform", "SGM Uniform", {"timestep_spacing": "trailing"}, ("trailing",)),
    # ComfyUI's differs from trailing by the rounding of a timestep.
    Schedule("simple", "Simple", {"timestep_spacing": "trailing"}),
    Schedule("normal", "Normal", {"timestep_spacing": "linspace"}, ("Uniform", "linspace"), min_steps=2),
    Schedule("ddim_uniform", "DDIM", {"timestep_spacing": "leading"}, ("leading",)),
)
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({schedule.name: schedule for schedule in _SCHEDULES})
_LEVELS = ("karras", "exponential", "beta")
_STEPS_BACK = ("sgm_uniform", "simple", "ddim_uniform")
_SPACINGS = ("sgm_uniform", "simple", "normal", "ddim_uniform")


@dataclass(frozen=True)
class Scheduler:
    """A value of the request's `scheduler`.

    `class_name` is the class in diffusers and `options` the keyword arguments of its from_config (merged into the
    config they would be dropped where the config lists them in `_use_default_values`); `display_name` is what A1111
    and Civitai show for the same sampler, `other_names` what else it is called (capitals, spaces, hyphens and
    underscores do not count; the class's name needs no entry). It runs with `min_steps` to `max_steps`
    num_inference_steps (None = as many as a request may ask for), and calls the UNet `order` times a step and
    `extra_calls` times more. `schedules` are the values of `schedule_type` that it takes beside automatic,
    `prediction_types` those of the checkpoint's config. `zero_snr`: it starts from pure noise where the checkpoint
    asks for that (rescale_betas_zero_snr); the others drop it silently. `timesteps`: it takes a list of them. `eta` is
    the request's `eta` where it is left out, None where the sampler has none. `nearest_to` are samplers that diffusers
    does not have and that this one is taken for, with a warning that ends in `difference`.
    """

    name: str
    class_name: str
    display_name: str
    options: Mapping[str, Any] = field(default_factory=lambda: NO_OPTIONS)
    other_names: tuple[str, ...] = ()
    min_steps: int = 1
    max_steps: int | None = None
    order: int = 1
    extra_calls: int = 0
    schedules: tuple[str, ...] = (*_LEVELS, *_SPACINGS)
    prediction_types: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    zero_snr: bool = False
    timesteps: bool = False
    eta: float | None = None
    nearest_to: tuple[str, ...] = ()
    difference: str = ""

    def calls(self, steps: int, skipped: int = 0) -> int:
        """How often the UNet is called in a run of `steps` steps that leaves out the first `skipped` of them."""
        return self.order * (steps - skipped) + self.extra_calls


_NOISE_TYPES = ("epsilon", "v_prediction")
_TWICE: Mapping[str, Any] = MappingProxyType({"order": 2, "extra_calls": -1})
_SDE: Mapping[str, Any] = MappingProxyType({"algorithm_type": "sde-dpmsolver++"})
# Latents lie far outside -1 to 1: a checkpoint whose config leaves this out would be drawn clipped.
_UNCLIPPED: Mapping[str, Any] = MappingProxyType({"clip_sample": False})

_ALL = (
    # The second call goes back over the first step. DDIM's and PNDM's steps go 1000 // steps back, whatever the list.
    Scheduler(
        "PNDM",
        "PNDMScheduler",
        "PLMS",
        # The Runge-Kutta steps that it would start with are not SDXL's, nor A1111's.
        {"skip_prk_steps": True},
        min_steps=2,
        extra_calls=1,
        schedules=_STEPS_BACK,
        prediction_types=_NOISE_TYPES,
    ),
    Scheduler("KLMS", "LMSDiscreteScheduler", "LMS"),
    Scheduler("DDIM", "DDIMScheduler", "DDIM", _UNCLIPPED, schedules=_STEPS_BACK, zero_snr=True, eta=0.0),
    Scheduler("K_EULER", "EulerDiscreteScheduler", "Euler", zero_snr=True, timesteps=True),
    Scheduler(
        "K_EULER_ANCESTRAL",
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        other_names=("euler_ancestral",),
        schedules=_SPACINGS,
        prediction_types=_NOISE_TYPES,
        zero_snr=True,
    ),
    Scheduler(
        "DPMSolverMultistep",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        zero_snr=True,
        timesteps=True,
    ),
    Scheduler(
        "DPMSolverSinglestep",
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S",
        schedules=_LEVELS,
        timesteps=True,
        nearest_to=("DPM++ 2S a", "dpmpp_2s_ancestral"),
        difference="which adds no noise between the steps",
    ),
    # A list of timesteps is not for the samplers of two calls a step: image-to-image would cut it in the wrong place.
    Scheduler("Heun", "HeunDiscreteScheduler", "Heun", _UNCLIPPED, **_TWICE),
    Scheduler("DPM2", "KDPM2DiscreteScheduler", "DPM2", prediction_types=_NOISE_TYPES, **_TWICE),
    Scheduler(
        "DPM2 a",
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        other_names=("dpm_2_ancestral",),
        prediction_types=_NOISE_TYPES,
        **_TWICE,
    ),
    Scheduler(
        "DPM++ 2M SDE",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        _SDE,
        ("dpmpp_2m_sde_gpu",),
        zero_snr=True,
        timesteps=True,
    ),
    Scheduler(
        "DPM++ 3M SDE",
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        {**_SDE, "solver_order": 3},
        ("dpmpp_3m_sde_gpu",),
        zero_snr=True,
        timesteps=True,
    ),
    Scheduler(
        "DPM++ SDE",
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        other_names=("dpmpp_sde_gpu",),
        prediction_types=_NOISE_TYPES,
        **_TWICE,
    ),
    Scheduler("DDPM", "DDPMScheduler", "DDPM", _UNCLIPPED, schedules=_SPACINGS, zero_snr=True, timesteps=True),
    Scheduler("UniPC", "UniPCMultistepScheduler", "UniPC", other_names=("uni_pc_bh2",), zero_snr=True),
    Scheduler("DEIS", "DEISMultistepScheduler", "DEIS"),
    # With Beta its error grows without bound in few steps.
    Scheduler("SA-Solver", "SASolverScheduler", "SA-Solver", schedules=("karras", "exponential", *_SPACINGS)),
    # Both choose among the 50 timesteps that they were distilled for.
    Scheduler("LCM", "LCMScheduler", "LCM", _UNCLIPPED, max_steps=50, schedules=(), zero_snr=True, timesteps=True),
    Scheduler(
        "TCD", "TCDScheduler", "TCD", _UNCLIPPED, max_steps=50, schedules=(), zero_snr=True, timesteps=True, eta=0.3
    ),
)

# In the order of the documentation.
SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType({scheduler.name: scheduler for scheduler in _ALL})


def scheduler_names() -> tuple[str, ...]:
    """The names of the samplers, in the order of the documentation."""
    return tuple(SCHEDULERS)


def schedule_names() -> tuple[str, ...]:
    """The names of the schedules, in the order of the documentation."""
    return tuple(SCHEDULES)
