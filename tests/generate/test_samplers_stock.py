"""Every sampler draws what stock diffusers draws with the class and the arguments that are written out here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sdxl_worker.generate import render as render_module
from sdxl_worker.generate.inpaint import made_ready
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.second_pass import Hires
from sdxl_worker.schedulers import SCHEDULERS
from tests.support.pictures import farthest, same

# scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0.
SHIPPED = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# By the name of a request: the class, the options, the arguments of the call, and the least steps.
STOCK: dict[str, tuple[Any, dict[str, Any], dict[str, Any], int]] = {
    "PNDM": (diffusers.PNDMScheduler, {}, {}, 2),
    "KLMS": (diffusers.LMSDiscreteScheduler, {}, {}, 1),
    "DDIM": (diffusers.DDIMScheduler, {}, {}, 1),
    "K_EULER": (diffusers.EulerDiscreteScheduler, {}, {}, 1),
    "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, {}, {}, 1),
    "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, {}, {}, 1),
    "DPMSolverSinglestep": (diffusers.DPMSolverSinglestepScheduler, {}, {}, 1),
    "Heun": (diffusers.HeunDiscreteScheduler, {}, {}, 1),
    "DPM2": (diffusers.KDPM2DiscreteScheduler, {}, {}, 1),
    "DPM2 a": (diffusers.KDPM2AncestralDiscreteScheduler, {}, {}, 1),
    "DPM++ 2M SDE": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}, 1),
    "DPM++ 3M SDE": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        {},
        1,
    ),
    "DPM++ SDE": (diffusers.DPMSolverSDEScheduler, {"noise_sampler_seed": 11}, {}, 1),
    "DDPM": (diffusers.DDPMScheduler, {}, {}, 1),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}, {}, 1),
    "DEIS": (diffusers.DEISMultistepScheduler, {}, {}, 1),
    "SA-Solver": (diffusers.SASolverScheduler, {}, {}, 1),
    "LCM": (diffusers.LCMScheduler, {}, {}, 1),
    "TCD": (diffusers.TCDScheduler, {}, {"eta": 0.3}, 1),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
    "exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "normal": {"timestep_spacing": "linspace"},
    "ddim_uniform": {"timestep_spacing": "leading"},
}
REQUEST = GenerationRequest("a lighthouse", width=64, height=64, seed=11, guidance_scale=5.5, num_inference_steps=4)
START = Image.linear_gradient("L").convert("RGB").resize((64, 64))


def stock(pipeline: Any, name: str, options: dict[str, Any] | None = None, **call: Any) -> Image.Image:
    """The picture of seed 11, by text-to-image, or image-to-image where the call has an image."""
    scheduler_class, own, arguments, _ = STOCK[name]
    pipeline_class = {
        frozenset(): diffusers.StableDiffusionXLPipeline,
        frozenset({"image"}): diffusers.StableDiffusionXLImg2ImgPipeline,
        frozenset({"image", "mask_image"}): diffusers.StableDiffusionXLInpaintPipeline,
    }[frozenset({"image", "mask_image"} & set(call))]
    components = {**pipeline.components, "scheduler": scheduler_class.from_config(SHIPPED, **own, **(options or {}))}
    view = pipeline_class(**components, add_watermarker=False)
    view.set_progress_bar_config(disable=True)
    size = {} if pipeline_class is diffusers.StableDiffusionXLImg2ImgPipeline else {"height": 64, "width": 64}
    generator = torch.Generator().manual_seed(11)
    arguments = {"num_inference_steps": 4, "guidance_scale": 5.5, **size, **arguments, **call}
    return view("a lighthouse", generator=generator, **arguments).images[0]


def test_every_sampler_is_here():
    assert {name: least for name, (*_, least) in STOCK.items()} == {
        name: scheduler.min_steps for name, scheduler in SCHEDULERS.items()
    }


@pytest.mark.parametrize("steps", [None, 4, 20], ids=["least", "4", "20"])
@pytest.mark.parametrize("name", STOCK)
def test_text_to_image(name: str, steps: int | None, pipeline):
    steps = steps or STOCK[name][3]
    request = replace(REQUEST, scheduler=name, num_inference_steps=steps)
    calls: list[tuple[int, int]] = []
    (picture,) = render(pipeline, request, on_step=lambda step, total, _latents: calls.append((step, total)))
    assert farthest(picture, stock(pipeline, name, num_inference_steps=steps)) <= 1
    total = SCHEDULERS[name].calls(steps)
    assert calls == [(call, total) for call in range(1, total + 1)]


@pytest.mark.parametrize(
    ("name", "schedule"), [(name, schedule) for name, row in SCHEDULERS.items() for schedule in row.schedules]
)
def test_each_schedule(name: str, schedule: str, pipeline):
    (picture,) = render(pipeline, replace(REQUEST, scheduler=name, schedule_type=schedule))
    options = SCHEDULES[schedule]
    if name == "DPMSolverSinglestep":
        options = {option: value for option, value in options.items() if option != "timestep_spacing"}
    assert farthest(picture, stock(pipeline, name, options)) <= 1


@pytest.mark.parametrize("name", STOCK)
def test_image_to_image(name: str, pipeline):
    request = replace(REQUEST, scheduler=name, num_inference_steps=5, strength=0.7, image_url="https://a/b")
    calls: list[int] = []
    inputs = {"image_url": START}
    (picture,) = render(pipeline, request, inputs=inputs, on_step=lambda step, _total, _latents: calls.append(step))
    assert farthest(picture, stock(pipeline, name, num_inference_steps=5, image=START, strength=0.7)) <= 1
    # int(5 x 0.7) steps are run.
    assert len(calls) == SCHEDULERS[name].calls(5, skipped=2)


@pytest.mark.parametrize("name", STOCK)
def test_a_picture_of_a_batch_is_that_of_its_seed_and_twice_the_same(name: str, pipeline):
    request = replace(REQUEST, scheduler=name)
    batch = render(pipeline, replace(request, num_images=3))
    alone = [render(pipeline, replace(request, seed=seed))[0] for seed in (11, 12, 13)]
    assert [farthest(*pair) <= 1 for pair in zip(batch, alone, strict=True)] == [True] * 3
    assert farthest(alone[0], alone[1]) > 1
    assert same(render(pipeline, request)[0], alone[0])


def test_a_timestep_that_stands_twice(pipeline):
    """From 32 steps on Beta rounds two levels to the first timestep."""
    (picture,) = render(pipeline, replace(REQUEST, scheduler="UniPC", schedule_type="beta", num_inference_steps=33))
    assert farthest(picture, stock(pipeline, "UniPC", SCHEDULES["beta"], num_inference_steps=33)) <= 1


def test_the_largest_seed_with_a_brownian_tree(pipeline):
    pictures = render(pipeline, replace(REQUEST, scheduler="DPM++ SDE", seed=2**64 - 1, num_images=2))
    assert farthest(*pictures) > 1


@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "TCD"])
def test_eta(name: str, eta: float | None, pipeline):
    (picture,) = render(pipeline, replace(REQUEST, scheduler=name, eta=eta))
    literal = {"DDIM": 0.0, "TCD": 0.3}[name] if eta is None else eta
    assert farthest(picture, stock(pipeline, name, eta=literal)) <= 1
    assert farthest(picture, stock(pipeline, name, eta=0.7)) > 1


@pytest.mark.parametrize("name", [name for name, scheduler in SCHEDULERS.items() if scheduler.timesteps])
def test_timesteps(name: str, pipeline):
    request = replace(REQUEST, scheduler=name, timesteps=(999, 600, 300, 100), num_inference_steps=4)
    literal: dict[str, Any] = {"timesteps": [999, 600, 300, 100]}
    (picture,) = render(pipeline, request)
    assert farthest(picture, stock(pipeline, name, **literal)) <= 1
    assert farthest(picture, render(pipeline, replace(request, timesteps=None))[0]) > 1
    (picture,) = render(pipeline, replace(request, strength=0.5, image_url="https://a/b"), inputs={"image_url": START})
    assert farthest(picture, stock(pipeline, name, **literal, image=START, strength=0.5)) <= 1


WHITE = Image.new("L", (64, 64), 255)


@pytest.mark.parametrize("given", [{}, {"image": START}, {"image": START, "mask_image": WHITE}], ids=len)
def test_guidance_rescale(given: dict[str, Any], pipeline):
    names = {"image": "image_url", "mask_image": "mask_url"}
    urls: dict[str, Any] = {names[name]: "https://a/b" for name in given}
    request = replace(REQUEST, scheduler="K_EULER", guidance_rescale=0.7, strength=0.8, **urls)
    inputs = {names[name]: given[name] for name in given}
    inputs = made_ready(request, inputs) if "mask_image" in given else inputs
    (picture,) = render(pipeline, request, inputs=inputs)
    call = {**given, "strength": 0.8} if given else {}
    assert farthest(picture, stock(pipeline, "K_EULER", guidance_rescale=0.7, **call)) <= 1
    assert farthest(picture, stock(pipeline, "K_EULER", **call)) > 1


def test_timesteps_are_for_the_first_pass_of_hires(pipeline):
    request = replace(REQUEST, scheduler="LCM", timesteps=(999, 600, 300, 100), hires=Hires(scale=1.5, steps=2))
    calls: list[int] = []
    (picture,) = render(pipeline, request, on_step=lambda step, _total, _latents: calls.append(step))
    assert (picture.size, calls) == ((96, 96), [1, 2, 3, 4, 5, 6])
    assert farthest(picture, render(pipeline, replace(request, timesteps=None))[0]) > 1


def test_a_checkpoint_s_own_levels_give_way(pipeline, monkeypatch):
    """To a schedule that is asked for, and to a list of timesteps; automatic keeps them."""
    karras = diffusers.EulerDiscreteScheduler.from_config(SHIPPED, use_karras_sigmas=True)
    monkeypatch.setattr(pipeline, "scheduler", karras)
    request = replace(REQUEST, scheduler="K_EULER")
    (picture,) = render(pipeline, request)
    assert farthest(picture, stock(pipeline, "K_EULER", {"use_karras_sigmas": True})) <= 1
    (picture,) = render(pipeline, replace(request, schedule_type="beta"))
    assert farthest(picture, stock(pipeline, "K_EULER", SCHEDULES["beta"])) <= 1
    (picture,) = render(pipeline, replace(request, timesteps=(999, 749, 499, 249)))
    assert farthest(picture, stock(pipeline, "K_EULER", timesteps=[999, 749, 499, 249])) <= 1


def test_lu_s_levels_give_way_too(pipeline, monkeypatch):
    resident = diffusers.DPMSolverMultistepScheduler.from_config(SHIPPED, use_lu_lambdas=True)
    monkeypatch.setattr(pipeline, "scheduler", resident)
    request = replace(REQUEST, scheduler="DPMSolverMultistep")
    (picture,) = render(pipeline, replace(request, schedule_type="sgm_uniform"))
    assert farthest(picture, stock(pipeline, "DPMSolverMultistep", SCHEDULES["sgm_uniform"])) <= 1
    (picture,) = render(pipeline, replace(request, timesteps=(999, 749, 499, 249)))
    assert farthest(picture, stock(pipeline, "DPMSolverMultistep", timesteps=[999, 749, 499, 249])) <= 1


@pytest.mark.parametrize("name", ["PNDM", "DDIM", "DDPM", "Heun"])
def test_a_checkpoint_that_leaves_out_what_sdxl_ships_is_drawn_alike(name: str, pipeline, monkeypatch):
    """Without these keys PNDM would begin with Runge-Kutta steps, and the others clip the latents."""
    config = {option: value for option, value in SHIPPED.items() if option not in ("skip_prk_steps", "clip_sample")}
    monkeypatch.setattr(pipeline, "scheduler", diffusers.EulerDiscreteScheduler.from_config(config))
    (picture,) = render(pipeline, replace(REQUEST, scheduler=name))
    assert farthest(picture, stock(pipeline, name)) <= 1


# What a folder may say beside what SDXL ships: of the solver that its author draws with.
OTHER_SOLVERS: dict[str, dict[str, Any]] = {
    # As in Lykon/dreamshaper-xl-1-0.
    "DEISMultistepScheduler": {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "lower_order_final": False,
    },
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
    "DDIMScheduler": {"clip_sample": True},
}


@pytest.mark.parametrize("solver", OTHER_SOLVERS)
@pytest.mark.parametrize("name", STOCK)
def test_a_checkpoint_that_is_drawn_with_another_solver_is_drawn_alike(name: str, solver: str, pipeline, monkeypatch):
    scheduler_class = getattr(diffusers, solver)
    resident = scheduler_class.from_config({**SHIPPED, **OTHER_SOLVERS[solver], "_class_name": solver})
    monkeypatch.setattr(pipeline, "scheduler", resident)
    (picture,) = render(pipeline, replace(REQUEST, scheduler=name))
    assert farthest(picture, stock(pipeline, name)) <= 1


def test_noise_of_one_batch_does_not_depend_on_the_others(pipeline, monkeypatch):
    monkeypatch.setattr(render_module, "MAX_BATCH_PIXELS", 64 * 64)
    request = replace(REQUEST, scheduler="DPM++ SDE", num_images=2)
    one_by_one = render(pipeline, request)
    monkeypatch.undo()
    together = render(pipeline, request)
    assert [farthest(*pair) <= 1 for pair in zip(one_by_one, together, strict=True)] == [True, True]
