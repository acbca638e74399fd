"""Pictures of prompts against pictures drawn from the formulas alone, and against stock diffusers, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from sdxl_worker import prompts
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from tests.support.plain_sdxl import Chunks, encoded, from_empty, mean_kept, picture, times

SHAPE = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 3, "scheduler": "K_EULER"}
BAD: Chunks = [[("bad hands", 1)]]
NINE = "x " * 9 + ", "
INPUT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def request(prompt: str, negative: str | None = "bad hands", syntax: str = "a1111", **fields) -> GenerationRequest:
    return GenerationRequest(prompt, negative_prompt=negative, prompt_syntax=syntax, **{**SHAPE, **fields})


def drawn(pipeline, *arguments, image: Image.Image | None = None, **fields) -> np.ndarray:
    inputs = {} if image is None else {"image_url": image}
    return np.asarray(render(pipeline, request(*arguments, **fields), inputs=inputs)[0])


def expected(pipeline, chunks: Chunks, negative: Chunks | None = BAD, rule=mean_kept, layer: int = 2) -> np.ndarray:
    other = None if negative is None else encoded(pipeline, negative, rule, layer)
    text = encoded(pipeline, chunks, rule, layer)
    return picture(pipeline, text, other, seed=3, steps=4, guidance=5.5, side=64)


def apart(first: np.ndarray, second: np.ndarray) -> int:
    """The largest difference of a channel, of 255."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


PROMPTS: dict[str, tuple[str, Chunks]] = {
    "emphasis": ("a (cat:1.5) on a mat", [[("a ", 1), ("cat", 1.5), (" on a mat", 1)]]),
    "round": ("a (cat) on a mat", [[("a ", 1), ("cat", 1.1), (" on a mat", 1)]]),
    "square": ("a [cat] on a mat", [[("a ", 1), ("cat", 1 / 1.1), (" on a mat", 1)]]),
    "nesting": ("((a:1.3) [b]) c", [[("a", 1.43), (" ", 1.1), ("b", 1), (" c", 1)]]),
    "escapes": (r"\(a\) \[b\] (c:1.4)", [[("(a) [b] ", 1), ("c", 1.4)]]),
    "escapes alone": (r"mejiro \(umamusume\)", [[("mejiro (umamusume)", 1)]]),
    "never closed": ("a ((b", [[("a ", 1), ("b", 1.21)]]),
    "never opened": ("a) (b:1.2", [[("a) ", 1), ("b:1.2", 1.1)]]),
    "weight 0": ("a (cat:0) b", [[("a ", 1), ("cat", 0), (" b", 1)]]),
    "negative weight": ("a (cat:-1.5) b", [[("a ", 1), ("cat", -1.5), (" b", 1)]]),
    "76 tokens": ("x " * 76, [[("x " * 75, 1)], [("x", 1)]]),
    "76 tokens, commas": (NINE * 7 + "x " * 6, [[(NINE * 7, 1)], [("x " * 6, 1)]]),
    "151 tokens": ("x " * 151, [[("x " * 75, 1)], [("x " * 75, 1)], [("x", 1)]]),
    "151 tokens, commas": (NINE * 15 + "x", [[(NINE * 7, 1)], [(NINE * 7, 1)], [(NINE + "x", 1)]]),
    "400 tokens": ("x " * 400, [*[[("x " * 75, 1)]] * 5, [("x " * 25, 1)]]),
    "400 tokens, commas": (NINE * 40, [*[[(NINE * 7, 1)]] * 5, [(NINE * 5, 1)]]),
    "weights in two chunks": ("(a " + "x " * 80 + ":1.3)", [[("a " + "x " * 74, 1.3)], [("x " * 6, 1.3)]]),
    "BREAK": ("a cat BREAK a (dog:1.3)", [[("a cat", 1)], [("a ", 1), ("dog", 1.3)]]),
    "BREAK in brackets": ("(a BREAK b:1.5)", [[("a", 1.5), ("BREAK", -1.5), ("b", 1.5)]]),
    "a tag": ("a <lyco:x:1>(cat:1.5)", [[("a ", 1), ("cat", 1.5)]]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_picture_of_a_prompt_is_that_of_its_formula(name: str, vivid) -> None:
    prompt, chunks = PROMPTS[name]
    assert apart(drawn(vivid, prompt), expected(vivid, chunks)) <= 1


def test_pictures_show_words_and_weights(vivid) -> None:
    """Without this the test above would say nothing."""
    assert apart(drawn(vivid, "a (cat:1.5)"), drawn(vivid, "a (cat:1.4)")) > 5
    assert apart(drawn(vivid, "x " * 400), drawn(vivid, "x " * 375)) > 1
    assert apart(drawn(vivid, "a BREAK b"), drawn(vivid, "a b")) > 5


@pytest.mark.parametrize(("name", "rule"), [("original", mean_kept), ("no_norm", times), ("comfyui", from_empty)])
def test_each_rule(name: str, rule, vivid) -> None:
    chunks: Chunks = [[("a ", 1), ("cat", 1.5), (" ", 1), ("dog", 0.2)], [("b", -0.5)]]
    negative: Chunks = [[("bad", 1.3), (" hands", 1)]]
    found = drawn(vivid, "a (cat:1.5) (dog:0.2) BREAK (b:-0.5)", "(bad:1.3) hands", prompt_emphasis=name)
    assert apart(found, expected(vivid, chunks, negative, rule)) <= 1


@pytest.mark.parametrize("lengths", [(3, 2), (2, 3), (1, 2), (5, 3)])
def test_prompts_of_unequal_length(lengths: tuple[int, int], vivid) -> None:
    chunks: list[Chunks] = [[[(word + " x" * 74, 1)]] * length for word, length in zip("ab", lengths, strict=True)]
    texts = [" ".join(text for chunk in one for text, _ in chunk) for one in chunks]
    assert apart(drawn(vivid, *texts), expected(vivid, chunks[0], chunks[1])) <= 1


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 4])
@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_clip_skip_holds_for_both_prompts(clip_skip: int, syntax: str, vivid) -> None:
    found = drawn(vivid, "a cat", "bad hands", syntax, clip_skip=clip_skip)
    assert apart(found, expected(vivid, [[("a cat", 1)]], layer=clip_skip)) <= 1


def test_clip_skip_shows(vivid) -> None:
    assert apart(drawn(vivid, "a cat", clip_skip=2), drawn(vivid, "a cat", clip_skip=3)) > 1


def test_a_plain_prompt_with_clip_skip_is_cut(vivid) -> None:
    found = drawn(vivid, "x " * 75 + "y " * 9, "bad hands", "plain", clip_skip=3)
    assert apart(found, expected(vivid, [[("x " * 75, 1)]], layer=3)) <= 1


@pytest.mark.parametrize("prompt", ["a (cat:1.5)", "x " * 151])
def test_a_negative_prompt_left_out_stays_zeroed(prompt: str, vivid) -> None:
    chunks: Chunks = [[("a ", 1), ("cat", 1.5)]] if "(" in prompt else [*[[("x " * 75, 1)]] * 2, [("x", 1)]]
    assert apart(drawn(vivid, prompt, None), expected(vivid, chunks, None)) <= 1
    assert apart(drawn(vivid, prompt, ""), expected(vivid, chunks, [[]])) <= 1
    assert apart(drawn(vivid, prompt, ""), drawn(vivid, prompt, None)) > 1


def test_a_model_that_encodes_what_was_left_out(vivid) -> None:
    vivid.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert apart(drawn(vivid, "a (cat:1.5)", None), expected(vivid, [[("a ", 1), ("cat", 1.5)]], [[]])) <= 1
    finally:
        vivid.register_to_config(force_zeros_for_empty_prompt=True)


def test_every_picture_of_a_batch_has_the_prompt(vivid) -> None:
    first, second = (np.asarray(one) for one in render(vivid, request("a (cat:1.5) BREAK b", num_images=2)))
    chunks: Chunks = [[("a ", 1), ("cat", 1.5)], [("b", 1)]]
    text, negative = encoded(vivid, chunks), encoded(vivid, BAD)
    assert apart(first, expected(vivid, chunks)) <= 1
    assert apart(second, picture(vivid, text, negative, seed=4, steps=4, guidance=5.5, side=64)) <= 1


def test_image_to_image_reads_long_prompts_as_well(vivid) -> None:
    text, negative = encoded(vivid, [[("a ", 1), ("cat", 1.5)], [("b", 1)]]), encoded(vivid, BAD)
    stock = stock_image_to_image(
        vivid,
        prompt_embeds=text.states,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=negative.states.repeat(1, 2, 1),
        negative_pooled_prompt_embeds=negative.pooled,
    )
    assert apart(drawn(vivid, "a (cat:1.5) BREAK b", image=INPUT, strength=0.6), stock) <= 1


def stock_image_to_image(pipeline, **prompts_of_it) -> np.ndarray:
    view = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    view.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    view.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    common = {"num_inference_steps": 4, "guidance_scale": 5.5, "generator": generator}
    return np.asarray(view(image=INPUT, strength=0.6, **common, **prompts_of_it).images[0])


def stock_text_to_image(pipeline, **prompts_of_it) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    shape = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 5.5, "generator": generator}
    return np.asarray(pipeline(**shape, **prompts_of_it).images[0])


@pytest.mark.parametrize("negative", ["bad hands", "", None])
@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_a_short_unweighted_prompt_has_the_bits_of_stock_diffusers(syntax: str, negative: str | None, vivid) -> None:
    drawn(vivid, "a (cat:1.5) BREAK b", clip_skip=3)
    named = {"prompt": "a cat, oil painting", "negative_prompt": negative}
    text_to_image = drawn(vivid, "a cat, oil painting", negative, syntax)
    assert np.array_equal(text_to_image, stock_text_to_image(vivid, **named))
    image_to_image = drawn(vivid, "a cat, oil painting", negative, syntax, image=INPUT, strength=0.6)
    assert np.array_equal(image_to_image, stock_image_to_image(vivid, **named))


def test_its_own_encoding_has_the_bits_of_stock_diffusers_too(vivid) -> None:
    """As where a short prompt meets a long negative one, or an embedding."""
    with prompts.applied(vivid, request("a cat", None, clip_skip=3)) as conditioning:
        arguments = conditioning.arguments([0])
    states, negative, pooled, negative_pooled = vivid.encode_prompt("a cat", clip_skip=1)
    assert torch.equal(arguments["prompt_embeds"], states)
    assert torch.equal(arguments["pooled_prompt_embeds"], pooled)
    assert torch.equal(arguments["negative_prompt_embeds"], negative)
    assert torch.equal(arguments["negative_pooled_prompt_embeds"], negative_pooled)


@pytest.mark.parametrize("prompt", ["(a:1.5) BREAK b <lora:x:1>", "x " * 100])
def test_plain_prompts_are_left_to_diffusers(prompt: str, vivid) -> None:
    named = {"prompt": prompt, "negative_prompt": prompt}
    assert np.array_equal(drawn(vivid, prompt, prompt, "plain"), stock_text_to_image(vivid, **named))


def test_too_many_chunks_name_the_field(vivid) -> None:
    for ask in (prompts.examined, lambda *two: prompts.applied(*two).__enter__()):
        with pytest.raises(InvalidRequest, match="negative_prompt takes 21 chunks"):
            ask(vivid, request("a", "x " * 1501))
    with pytest.raises(InvalidRequest, match="prompt holds a weight that is too large"):
        prompts.examined(vivid, request("(" * 9000 + "a"))
    with pytest.raises(InvalidRequest, match="clip_skip must be at most 5"):
        prompts.examined(vivid, request("a", clip_skip=6))


def test_reading_a_prompt_beside_a_render_leaves_the_tokenizers_state_alone(pipeline):
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    for tokenizer in tokenizers:
        # What diffusers' encode_prompt does, in a job that another one is made ready beside.
        tokenizer("a cat", padding="max_length", max_length=77, truncation=True)
    prompts.examined(pipeline, GenerationRequest(prompt="a (dog:1.2)", prompt_syntax="a1111"))
    for tokenizer in tokenizers:
        assert tokenizer.backend_tokenizer.padding["length"] == 77
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 77
