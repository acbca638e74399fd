"""Checkpoints that predict v, with zero terminal SNR, against diffusers configured by hand."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdxl_worker.errors import InvalidRequest, ModelUnavailable
from sdxl_worker.generate.load import load_pipeline
from sdxl_worker.generate.prediction import notes_on_sampler
from sdxl_worker.generate.render import render
from sdxl_worker.generate.samplers import make_scheduler
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import SCHEDULERS, scheduler_names
from sdxl_worker.settings import Settings
from tests.support.pictures import farthest
from tests.support.single_file import save_configs, save_single_file

REQUEST = GenerationRequest(
    "a lighthouse", "fog", height=64, width=64, seed=11, num_inference_steps=4, guidance_scale=5.5
)
CALL: dict[str, Any] = {
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "guidance_scale": 5.5,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
V_ONLY = {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
EPSILON = {"prediction_type": "epsilon", "timestep_spacing": "leading"}


@pytest.fixture
def load(pipeline, tmp_path: Path):
    """Loads the tiny SDXL from a single file with marks and metadata."""

    def loaded(marks=(), metadata=None, **settings: Any):
        checkpoint = save_single_file(pipeline, tmp_path / "model.safetensors", marks, metadata)
        save_configs(pipeline, tmp_path / "model")
        return load_pipeline(Settings(model_id=str(checkpoint), lora_cache_dir=tmp_path / "loras", **settings))[0]

    return loaded


def by_hand(pipeline: Any, scheduler: Any) -> Any:
    """The picture of stock diffusers with that scheduler on the components of `pipeline`."""
    stock = diffusers.StableDiffusionXLPipeline(**{**pipeline.components, "scheduler": scheduler})
    stock.set_progress_bar_config(disable=True)
    return stock(**CALL, generator=torch.Generator().manual_seed(11)).images[0]


@pytest.mark.parametrize(
    ("name", "scheduler_class", "options"),
    [
        ("K_EULER", "EulerDiscreteScheduler", {}),
        ("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler", {}),
        ("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler", {}),
        ("UniPC", "UniPCMultistepScheduler", {}),
    ],
)
def test_a_file_with_the_marks_renders_as_diffusers_configured_by_hand(name, scheduler_class, options, load, pipeline):
    loaded = load(("v_pred", "ztsnr"))
    scheduler = getattr(diffusers, scheduler_class)
    picture = render(loaded, replace(REQUEST, scheduler=name))[0]
    # The weights lie elsewhere in memory: CPU kernels may round the last bit differently.
    assert farthest(picture, by_hand(pipeline, scheduler(**BETAS, **V_ZERO_SNR, **options))) <= 1
    assert farthest(picture, by_hand(pipeline, scheduler(**BETAS, **EPSILON, **options))) > 1


@pytest.mark.parametrize(
    ("marks", "metadata", "setting", "expected"),
    [
        ((), None, "", EPSILON),
        (("v_pred",), None, "", V_ONLY),
        (("model.diffusion_model.v_pred", "model.diffusion_model.ztsnr"), None, "", V_ZERO_SNR),
        ((), {"modelspec.prediction_type": "v"}, "", V_ZERO_SNR),
        ((), {"modelspec.predict_key": "v"}, "", V_ZERO_SNR),
        ((), None, "v_prediction", V_ZERO_SNR),
        (("v_pred",), None, "v_prediction", V_ONLY),
        (("v_pred", "ztsnr"), None, "epsilon", EPSILON),
    ],
)
def test_the_config_that_every_sampler_is_made_from(marks, metadata, setting, expected, load):
    config = load(marks, metadata, prediction_type=setting).scheduler.config
    # A missing entry is diffusers' default, which is False.
    assert config.get("rescale_betas_zero_snr", False) is expected.get("rescale_betas_zero_snr", False)
    assert (config.prediction_type, config.timestep_spacing) == (
        expected["prediction_type"],
        expected["timestep_spacing"],
    )


def test_a_folder_keeps_its_own_config_unless_the_setting_says_otherwise(pipeline, tmp_path: Path):
    stock = diffusers.StableDiffusionXLPipeline(
        **{**pipeline.components, "scheduler": diffusers.DDIMScheduler(**BETAS, **V_ZERO_SNR)}
    )
    stock.save_pretrained(tmp_path / "model")
    settings = Settings(model_id=str(tmp_path / "model"), lora_cache_dir=tmp_path / "loras")
    kept, _ = load_pipeline(settings)
    expected = by_hand(pipeline, diffusers.EulerDiscreteScheduler(**BETAS, **V_ZERO_SNR))
    assert farthest(render(kept, replace(REQUEST, scheduler="K_EULER"))[0], expected) <= 1
    changed, _ = load_pipeline(replace(settings, prediction_type="epsilon"))
    assert changed.scheduler.config.prediction_type == "epsilon"
    assert changed.scheduler.config.rescale_betas_zero_snr is False


def test_a_setting_that_says_what_the_folder_says_changes_nothing(pipeline, tmp_path: Path):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, **V_ONLY)
    diffusers.StableDiffusionXLPipeline(**{**pipeline.components, "scheduler": scheduler}).save_pretrained(
        tmp_path / "a"
    )
    settings = Settings(model_id=str(tmp_path / "a"), lora_cache_dir=tmp_path, prediction_type="v_prediction")
    config = load_pipeline(settings)[0].scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == (
        "v_prediction",
        False,
        "leading",
    )


def test_the_built_in_model_takes_the_setting_too(pipeline, tmp_path: Path):
    loaded, _ = load_pipeline(Settings(model_id="tiny", lora_cache_dir=tmp_path, prediction_type="v_prediction"))
    expected = by_hand(pipeline, diffusers.EulerAncestralDiscreteScheduler(**BETAS, **V_ZERO_SNR))
    assert farthest(render(loaded, replace(REQUEST, scheduler="K_EULER_ANCESTRAL"))[0], expected) <= 1


def test_an_edm_model_is_refused_unless_the_setting_says_what_it_predicts(load):
    with pytest.raises(ModelUnavailable, match=r"EDM model \(the tensor edm_vpred\.sigma_max\)"):
        load(("edm_vpred.sigma_max", "v_pred"))
    assert load(("edm_vpred.sigma_max",), prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"


def test_an_edm_model_in_a_folder_is_refused(pipeline, tmp_path: Path):
    stock = diffusers.StableDiffusionXLPipeline(**{**pipeline.components, "scheduler": diffusers.EDMEulerScheduler()})
    stock.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelUnavailable, match=r"EDM model \(its scheduler is EDMEulerScheduler\)"):
        load_pipeline(Settings(model_id=str(tmp_path / "model"), lora_cache_dir=tmp_path / "loras"))


@pytest.fixture
def predicts_v(pipeline, monkeypatch):
    """The session's tiny SDXL, as if its checkpoint predicted v with zero terminal SNR."""
    monkeypatch.setattr(pipeline, "scheduler", diffusers.EulerDiscreteScheduler(**BETAS, **V_ZERO_SNR))
    return pipeline


@pytest.mark.parametrize("name", scheduler_names())
def test_every_sampler_draws_and_those_that_leave_zero_snr_out_are_named(name: str, predicts_v):
    request = replace(REQUEST, scheduler=name)
    # Raises where a value is not finite.
    assert len(render(predicts_v, request)) == 1
    parameters = inspect.signature(getattr(diffusers, SCHEDULERS[name].class_name)).parameters
    # A job that is made ready while another one renders finds that one's scheduler in the pipeline.
    busy = make_scheduler(name, predicts_v.scheduler.config).config
    assert notes_on_sampler(busy, request) == notes_on_sampler(predicts_v.scheduler.config, request)
    notes = notes_on_sampler(predicts_v.scheduler.config, request)
    if "rescale_betas_zero_snr" in parameters:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"scheduler {name} leaves out the zero terminal SNR")
        assert "K_EULER, K_EULER_ANCESTRAL, DPMSolverMultistep" in note
        assert f", {name}" not in note


@pytest.mark.parametrize("name", ["K_EULER", "DPMSolverMultistep", "DPM++ 2M SDE", "UniPC"])
def test_beta_is_refused_from_zero_snr_on_with_what_the_sampler_takes(name, predicts_v):
    request = replace(REQUEST, scheduler=name, schedule_type="beta")
    takes = "automatic, karras, exponential, sgm_uniform, simple, normal, ddim_uniform"
    with pytest.raises(InvalidRequest, match=rf"{re.escape(name)} takes schedule_type {takes}, not beta$"):
        notes_on_sampler(predicts_v.scheduler.config, request)
    assert notes_on_sampler({"prediction_type": "epsilon"}, request) == []
    assert notes_on_sampler({"prediction_type": "v_prediction"}, request) == []


@pytest.mark.parametrize("schedule", ["automatic", "karras", "exponential", "sgm_uniform", "normal", "ddim_uniform"])
@pytest.mark.parametrize("name", ["K_EULER", "DPMSolverMultistep", "UniPC"])
def test_every_other_schedule_leads_to_the_data(name: str, schedule: str):
    """With the exact v for data of one mean and deviation, the samples come out so, however many steps there are.

    Left to look for the first timestep themselves, stock multistep solvers raise with Karras and Exponential from 21
    steps on, where it stands twice; the pipelines tell them the first step.
    """
    zero_snr = diffusers.DDIMScheduler(**BETAS, **V_ZERO_SNR).alphas_cumprod.double()

    def exact(sample: torch.Tensor, time: float, mean: float = 1.5, deviation: float = 0.5) -> torch.Tensor:
        position = min(max(float(time), 0.0), 999.0)
        below = int(position)
        signal = torch.lerp(zero_snr[below], zero_snr[min(below + 1, 999)], position - below)
        a, b = signal.sqrt(), (1 - signal).sqrt()
        data = mean + deviation**2 * a / (signal * deviation**2 + 1 - signal) * (sample.double() - a * mean)
        return (a * (sample.double() - a * data) / b - b * data).float()

    config = diffusers.EulerDiscreteScheduler(**BETAS, **V_ZERO_SNR).config
    scheduler = make_scheduler(name, config, schedule)
    scheduler.set_timesteps(28)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((1, 4, 32, 32), generator=generator) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        velocity = exact(scheduler.scale_model_input(sample, time), time)
        sample = scheduler.step(velocity, time, sample).prev_sample
    assert sample.mean().item() == pytest.approx(1.5, abs=0.03)
    assert sample.std().item() == pytest.approx(0.5, abs=0.1)


def test_a_sampler_that_does_not_know_what_the_model_predicts_is_refused():
    with pytest.raises(InvalidRequest, match=r"predicts sample: take .*K_EULER, "):
        notes_on_sampler({"prediction_type": "sample"}, replace(REQUEST, scheduler="PNDM"))
