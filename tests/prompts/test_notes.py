"""What a request is warned of about its prompts."""

from __future__ import annotations

import pytest

from sdxl_worker import prompts
from sdxl_worker.request import GenerationRequest


def notes(pipeline, prompt: str, negative: str | None = None, syntax: str | None = None) -> list[str]:
    return prompts.examined(pipeline, GenerationRequest(prompt, negative_prompt=negative, prompt_syntax=syntax))


@pytest.mark.parametrize(
    "prompt",
    [
        "a lighthouse on a cliff at dusk, heavy sea, volumetric light, detailed oil painting",
        "a photograph of an astronaut riding a horse in a field of sunflowers, golden hour, highly detailed, "
        "masterpiece, best quality",
    ],
)
def test_an_ordinary_prompt_fits(prompt: str, pipeline) -> None:
    assert notes(pipeline, prompt, "blurry, low quality, watermark, text") == []
    assert notes(pipeline, prompt, "blurry, low quality, watermark, text", "a1111") == []
    assert len(pipeline.tokenizer(prompt).input_ids) < 0.7 * len(prompt)


def test_a_prompt_that_is_cut_off_is_named(pipeline) -> None:
    # One token per character with the tiny tokenizer, the spaces left out.
    assert notes(pipeline, "a" * 75) == []
    assert notes(pipeline, "a" * 76, "b " * 100) == [
        "prompt has 76 tokens; the model reads the first 75",
        "negative_prompt has 100 tokens; the model reads the first 75",
    ]
    assert notes(pipeline, "a" * 76, "b " * 100, "a1111") == []


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a (cat:1.3), (dog)", "emphasis ('cat' with weight 1.3)"),
        ("a [cat]", "emphasis ('cat' with weight 0.9091)"),
        ("a BREAK b", "BREAK"),
        ("a <lora:x:0.8>", "the tag '<lora:x:0.8>'"),
        (r"a \(b\)", r"the escaped bracket \("),
        ("(a) BREAK b", "emphasis ('a' with weight 1.1), BREAK"),
        ("(" * 9000 + "a", "emphasis"),
    ],
)
def test_what_plain_reads_as_words_is_named_with_the_word_to_set(prompt: str, named: str, pipeline) -> None:
    for syntax in (None, "plain"):
        *_, sentence = notes(pipeline, prompt, None, syntax)
        assert sentence == f'prompt holds {named}, read as plain words; set prompt_syntax to "a1111" for its meaning'
    assert notes(pipeline, "a", prompt)[-1].startswith(f"negative_prompt holds {named}")


def test_what_a1111_leaves_out_is_named(pipeline) -> None:
    assert notes(pipeline, "a <lyco:x:1> <hypernet:y:1>", None, "a1111") == [
        "prompt: '<lyco:x:1>' is not supported and was left out",
        "prompt: '<hypernet:y:1>' is not supported and was left out",
    ]
    assert notes(pipeline, "(a BREAK b:1.2)", None, "a1111") == [
        "prompt: BREAK inside of brackets is read as a word, as AUTOMATIC1111 does; put it outside"
    ]
