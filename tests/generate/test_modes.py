"""One entry per way to render."""

from __future__ import annotations

import diffusers
import pytest
from PIL import Image

from sdxl_worker.generate import modes
from sdxl_worker.generate.modes import Mode, mode_for, view_of
from sdxl_worker.request import GenerationRequest

PICTURE = Image.new("RGB", (8, 8))


def test_the_pictures_that_are_there_choose_the_mode():
    assert mode_for({}).class_name == "StableDiffusionXLPipeline"
    assert mode_for({"image_url": PICTURE}).class_name == "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(KeyError):
        mode_for({"mask_url": PICTURE})


def test_a_view_runs_on_the_resident_components(pipeline):
    assert view_of(pipeline, "StableDiffusionXLPipeline") is pipeline
    view = view_of(pipeline, "StableDiffusionXLImg2ImgPipeline")
    assert type(view) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert all(view.components[name] is part for name, part in pipeline.components.items())
    assert view.config.force_zeros_for_empty_prompt is True
    assert view.watermark is None


def test_another_mode_takes_one_entry(pipeline, monkeypatch):
    def arguments(request: GenerationRequest, inputs: modes.Inputs) -> dict:
        return {"image": inputs["image_url"], "mask_image": inputs["other"], "strength": request.strength}

    other = Mode(frozenset({"image_url", "other"}), "StableDiffusionXLInpaintPipeline", arguments)
    monkeypatch.setattr(modes, "MODES", {**modes.MODES, other.needs: other})
    inputs = {"other": PICTURE, "image_url": PICTURE}
    chosen = mode_for(inputs)
    (only,) = chosen.passes(pipeline, GenerationRequest("a", strength=0.5), inputs)
    assert type(only.view) is diffusers.StableDiffusionXLInpaintPipeline
    assert only.arguments == {"image": PICTURE, "mask_image": PICTURE, "strength": 0.5}
    assert chosen.finished(GenerationRequest("a"), {}) is None
