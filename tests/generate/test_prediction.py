"""Checkpoints that predict v, with zero terminal SNR, against diffusers configured by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.load import load_pipeline
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
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
    ("name", "scheduler_class"),
    [
        ("K_EULER", "EulerDiscreteScheduler"),
        ("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_file_with_the_marks_renders_as_diffusers_configured_by_hand(name, scheduler_class, load, pipeline):
    loaded = load(("v_pred", "ztsnr"))
    scheduler = getattr(diffusers, scheduler_class)
    picture = render(loaded, replace(REQUEST, scheduler=name))[0]
    # The weights lie elsewhere in memory: CPU kernels may round the last bit differently.
    assert farthest(picture, by_hand(pipeline, scheduler(**BETAS, **V_ZERO_SNR))) <= 1
    assert farthest(picture, by_hand(pipeline, scheduler(**BETAS, **EPSILON))) > 1


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


def test_the_built_in_model_takes_the_setting_too(pipeline, tmp_path: Path):
    loaded, _ = load_pipeline(Settings(model_id="tiny", lora_cache_dir=tmp_path, prediction_type="v_prediction"))
    expected = by_hand(pipeline, diffusers.EulerAncestralDiscreteScheduler(**BETAS, **V_ZERO_SNR))
    assert farthest(render(loaded, replace(REQUEST, scheduler="K_EULER_ANCESTRAL"))[0], expected) <= 1


def test_an_edm_model_is_refused_unless_the_setting_says_what_it_predicts(load):
    with pytest.raises(ModelUnavailable, match=r"EDM model \(the tensor edm_vpred\.sigma_max\)"):
        load(("edm_vpred.sigma_max", "v_pred"))
    assert load(("edm_vpred.sigma_max",), prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"
