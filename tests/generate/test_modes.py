"""One entry per way to render."""

from __future__ import annotations

import diffusers
import pytest
from PIL import Image

from sdxl_worker.generate import modes
from sdxl_worker.generate.modes import Mode, mode_for
from sdxl_worker.request import GenerationRequest

PICTURE = Image.new("RGB", (8, 8))


def test_the_pictures_that_are_there_choose_the_mode():
    assert mode_for({}).class_name == "StableDiffusionXLPipeline"
    assert mode_for({"image_url": PICTURE}).class_name == "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(KeyError):
        mode_for({"mask_url": PICTURE})


def test_a_view_runs_on_the_resident_components(pipeline):
    assert mode_for({}).view(pipeline) is pipeline
    view = mode_for({"image_url": PICTURE}).view(pipeline)
    assert type(view) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert all(view.components[name] is part for name, part in pipeline.components.items())
    assert view.config.force_zeros_for_empty_prompt is True
    assert view.watermark is None


def test_another_mode_takes_one_entry(pipeline, monkeypatch):
    def arguments(request: GenerationRequest, inputs: modes.Inputs) -> dict:
        return {"image": inputs["image_url"], "mask_image": inputs["mask_url"], "strength": request.strength}

    inpaint = Mode(frozenset({"image_url", "mask_url"}), "StableDiffusionXLInpaintPipeline", arguments)
    monkeypatch.setattr(modes, "MODES", {**modes.MODES, inpaint.needs: inpaint})
    chosen = mode_for({"mask_url": PICTURE, "image_url": PICTURE})
    assert type(chosen.view(pipeline)) is diffusers.StableDiffusionXLInpaintPipeline
    assert chosen.finished(GenerationRequest("a"), {}) is None
