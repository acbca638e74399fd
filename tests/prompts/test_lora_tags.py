"""What a tag in a prompt names, as A1111 and Forge read it, and with which numbers."""

from __future__ import annotations

import pytest

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.lora_tags import split_body, with_lora_tags
from sdxl_worker.request import GenerationRequest, LoraScale, LoraSpan, LoraSpec


@pytest.mark.parametrize(
    ("body", "reference", "numbers"),
    [
        ("style", "style", {}),
        ("style:0.8", "style", {"te": 0.8}),
        ("my style : 0.8 ", "my style", {"te": 0.8}),
        ("style:0.5:1", "style", {"te": 0.5, "unet": 1.0}),
        ("style:-.5:+1.", "style", {"te": -0.5, "unet": 1.0}),
        ("style:1e-1", "style", {"te": 0.1}),
        ("style:unet=0.4", "style", {"unet": 0.4}),
        ("style:0.7:unet=0.4", "style", {"te": 0.7, "unet": 0.4}),
        ("style:te=0.7:unet=0.4", "style", {"te": 0.7, "unet": 0.4}),
        ("style:te=0.7:0.4", "style", {"te": 0.7}),
        ("style:0.8:start=0.2:end=0.6", "style", {"te": 0.8, "start": 0.2, "end": 0.6}),
        ("style:end=0.6:0.5:1", "style", {"te": 0.5, "unet": 1.0, "end": 0.6}),
        ("style:0.1:0.5:start=.2:1", "style:0.1", {"te": 0.5, "unet": 1.0, "start": 0.2}),
        ("style:start=0.1:start=0.2", "style:start=0.1", {"start": 0.2}),
        ("civitai:12345:end=0.5", "civitai:12345", {"end": 0.5}),
        ("user/repo@v1/a.safetensors:0.5:1", "user/repo@v1/a.safetensors", {"te": 0.5, "unet": 1.0}),
        ("https://example.com:8000/a.safetensors?x=1:0.8", "https://example.com:8000/a.safetensors?x=1", {"te": 0.8}),
        ("https://example.com:8000/a.safetensors", "https://example.com:8000/a.safetensors", {}),
        ("civitai:12345", "civitai:12345", {}),
        ("civitai:12345:0.8", "civitai:12345", {"te": 0.8}),
        ("civitai:12345@67890:0.5:1", "civitai:12345@67890", {"te": 0.5, "unet": 1.0}),
        ("urn:air:sdxl:lora:civitai:12345@67890:0.8", "urn:air:sdxl:lora:civitai:12345@67890", {"te": 0.8}),
        ("urn:air:sdxl:lora:civitai:12345:1:2", "urn:air:sdxl:lora:civitai:12345", {"te": 1.0, "unet": 2.0}),
        ("style:abc", "style:abc", {}),
        ("style:nan", "style:nan", {}),
        ("", "", {}),
        ("0.8", "0.8", {}),
    ],
)
def test_numbers_are_split_off_from_the_right(body: str, reference: str, numbers: dict[str, float]) -> None:
    assert split_body(body) == (reference, numbers)


def asked(prompt: str, negative: str | None = None, *loras: LoraSpec, syntax: str = "a1111") -> GenerationRequest:
    return GenerationRequest(prompt, negative_prompt=negative, prompt_syntax=syntax, loras=loras)


def test_one_number_is_for_all_and_two_are_text_encoders_and_unet() -> None:
    """A1111's order: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features, "Extra networks"."""
    found = with_lora_tags(asked("a <lora:x:0.8> cat <lora:y:0.5:1><LORA:z>", None, LoraSpec("first")))
    assert [(spec.reference, spec.scale, spec.tag) for spec in found.loras] == [
        ("first", LoraScale(), ""),
        ("x", LoraScale.uniform(0.8), "<lora:x>"),
        ("y", LoraScale(unet=1.0, text_encoder=0.5, text_encoder_2=0.5), "<lora:y>"),
        ("z", LoraScale(), "<lora:z>"),
    ]
    assert found.loras_requested
    assert found.prompt == "a <lora:x:0.8> cat <lora:y:0.5:1><LORA:z>"
    assert found.warnings == ()


def test_a_tag_may_say_at_which_steps() -> None:
    (spec,) = with_lora_tags(asked("a <lora:x:0.8:start=0.2:end=0.6>")).loras
    assert (spec.scale, spec.span) == (LoraScale.uniform(0.8), LoraSpan(0.2, 0.6))
    skipped = with_lora_tags(asked("a <lora:x:end=1.5> <lora:y:start=0.5:end=0.5>"))
    assert skipped.loras == ()
    assert skipped.warnings == (
        "the tag <lora:x> was skipped: its end is 1.5 and must lie between 0 and 1",
        "the tag <lora:y> was skipped: its start is 0.5 and must lie below its end, which is 0.5",
    )


@pytest.mark.parametrize(("prompt", "syntax"), [("a <lora:x:1>", "plain"), ("a cat <lyco:x>", "a1111")])
def test_other_prompts_name_none(prompt: str, syntax: str) -> None:
    request = asked(prompt, syntax=syntax)
    assert with_lora_tags(request) is request


def test_a_weight_out_of_range_is_a_skipped_tag() -> None:
    found = with_lora_tags(asked("a <lora:x:101> <lora:y:1> <lora:https://a.example/f.safetensors?token=s3cret:1e9>"))
    assert [spec.reference for spec in found.loras] == ["y"]
    assert found.warnings == (
        "the tag <lora:x> was skipped: its scale is 101.0 and must lie between -100 and 100",
        "the tag <lora:https://a.example/f.safetensors> was skipped: its scale is 1000000000.0 and must lie between "
        "-100 and 100",
    )


@pytest.mark.parametrize(
    ("prompt", "negative", "sentence"),
    [
        ("a", "blur <lora:x:1>", "negative_prompt holds the tag <lora:x>"),
        ("<lora:x>" * 32, None, "loras and the tags in prompt name 33 LoRAs and may name at most 32"),
        ("(" * 9000 + "a", None, "prompt holds a weight that is too large"),
    ],
)
def test_what_is_refused(prompt: str, negative: str | None, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        with_lora_tags(asked(prompt, negative, LoraSpec("first")))


def test_a_tag_of_10_000_colons_is_one_reference() -> None:
    reference, numbers = split_body(":" * 10_000)
    assert (len(reference), numbers) == (10_000, {})
