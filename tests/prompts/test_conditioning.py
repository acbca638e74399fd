"""What the prompts of a request become, and what of them the model does not read."""

from __future__ import annotations

import pytest

from sdxl_worker import prompts
from sdxl_worker.request import GenerationRequest


@pytest.mark.parametrize(
    "prompt",
    [
        "a lighthouse on a cliff at dusk, heavy sea, volumetric light, detailed oil painting",
        "a photograph of an astronaut riding a horse in a field of sunflowers, golden hour, highly detailed, "
        "masterpiece, best quality",
    ],
)
def test_an_ordinary_prompt_fits(prompt: str, pipeline):
    assert prompts.examined(pipeline, GenerationRequest(prompt, "blurry, low quality, watermark, text")) == []
    assert len(pipeline.tokenizer(prompt).input_ids) < 0.7 * len(prompt)


def test_a_prompt_that_is_cut_off_is_named(pipeline):
    # One token per character with the tiny tokenizer, the spaces left out.
    assert prompts.examined(pipeline, GenerationRequest("a" * 75)) == []
    assert prompts.examined(pipeline, GenerationRequest("a" * 76, "b " * 100)) == [
        "prompt has 76 tokens; the model reads the first 75",
        "negative_prompt has 100 tokens; the model reads the first 75",
    ]
