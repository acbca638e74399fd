"""The calls of the UNet are counted before they are made."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from PIL import Image

from sdxl_worker.generate import samplers
from sdxl_worker.generate.calls import unet_calls
from sdxl_worker.generate.modes import view_of
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import scheduler_names

WORDS = {"prompt": "a", "output_type": "latent"}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("StableDiffusionXLPipeline", {"num_inference_steps": 5, "height": 64, "width": 64}),
    ("StableDiffusionXLPipeline", {"num_inference_steps": 5, "height": 64, "width": 64, "denoising_end": 0.6}),
    ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 7, "strength": 0.6}),
    ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 7, "denoising_start": 0.3}),
    ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 7, "strength": 0.9, "denoising_end": 0.7}),
]


@pytest.mark.parametrize("name", scheduler_names())
@pytest.mark.parametrize(("class_name", "arguments"), CALLS)
def test_as_often_as_diffusers_calls_the_unet(name: str, class_name: str, arguments: dict, pipeline, monkeypatch):
    unet = mock.Mock(wraps=pipeline.unet.forward)
    monkeypatch.setattr(pipeline.unet, "forward", unet)
    with samplers.applied(pipeline, GenerationRequest("a", scheduler=name)):
        view = view_of(pipeline, class_name)
        expected = unet_calls(view, arguments)
        picture = {} if class_name == "StableDiffusionXLPipeline" else {"image": Image.new("RGB", (64, 64))}
        view(**WORDS, **arguments, **picture)
    assert unet.call_count == expected > 0
