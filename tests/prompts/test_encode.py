"""Hidden states against stock diffusers and against the weighting formulas."""

from __future__ import annotations

import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.emphasis import RULES
from sdxl_worker.prompts.encode import encode
from sdxl_worker.prompts.reading import read, tokenizers_of
from sdxl_worker.prompts.vectors import NO_EMBEDDINGS, Vectors
from sdxl_worker.request import EMPHASIS_RULES
from tests.support.plain_sdxl import Chunks, encoded, from_empty, mean_kept, times


class Values:
    """The word EMB stands for two vectors, of another value for each encoder."""

    def __init__(self, pipeline) -> None:
        widths = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
        self.of = {name: torch.full((2, encoder.config.hidden_size), 0.5) for name, encoder in widths.items()}

    def split(self, text: str, encoder: str) -> list[str | Vectors]:
        before, found, after = text.partition("EMB")
        return [before, Vectors("EMB", self.of[encoder]), after] if found else [text]


def ours(pipeline, text: str, *arguments, embeddings=NO_EMBEDDINGS):
    (result,) = encode(pipeline, [read(text, "a1111", tokenizers_of(pipeline), embeddings)], *arguments)
    return result


@pytest.mark.parametrize("text", ["a cat, oil painting", "", "x " * 75])
def test_stock_diffusers_gives_the_same_bits(text: str, vivid) -> None:
    states, _, pooled, _ = vivid.encode_prompt(text)
    result = ours(vivid, text)
    assert torch.equal(result.states, states)
    assert torch.equal(result.pooled, pooled)


def test_half_precision_weights_give_half_precision_states() -> None:
    pipeline = topology.build_sdxl(dtype=torch.bfloat16)
    states, _, pooled, _ = pipeline.encode_prompt("a cat")
    result = ours(pipeline, "a cat")
    assert torch.equal(result.states, states)
    assert torch.equal(result.pooled, pooled)
    assert ours(pipeline, "a (cat:1.3)").states.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "rule"), [("original", mean_kept), ("no_norm", times), ("comfyui", from_empty)])
def test_each_rule_is_its_formula(name: str, rule, vivid) -> None:
    text = "a (cat:1.5) [dog] BREAK (x:-0.5) BREAK " + "x " * 20
    chunks: Chunks = [[("a ", 1), ("cat", 1.5), (" ", 1), ("dog", 1 / 1.1)], [("x", -0.5)], [("x " * 20, 1)]]
    expected = encoded(vivid, chunks, rule)
    result = ours(vivid, text, name)
    torch.testing.assert_close(result.states, expected.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.pooled, expected.pooled, rtol=1e-5, atol=1e-6)


def test_the_empty_chunk_is_of_the_same_layer(vivid) -> None:
    expected = encoded(vivid, [[("a ", 1), ("cat", 1.5)]], from_empty, layer=3)
    torch.testing.assert_close(ours(vivid, "a (cat:1.5)", "comfyui", 3).states, expected.states, rtol=1e-4, atol=1e-5)


def test_every_rule_of_the_request_is_there() -> None:
    assert tuple(RULES) == EMPHASIS_RULES


def test_many_chunks_are_encoded_in_parts(vivid) -> None:
    chunks: Chunks = [[("x " * 75, 1)]] * 19 + [[("a (b", 1)]]
    result = ours(vivid, "x " * 75 * 19 + r"a \(b")
    torch.testing.assert_close(result.states, encoded(vivid, chunks).states, rtol=1e-4, atol=1e-5)


def test_vectors_take_the_place_of_token_embeddings(vivid) -> None:
    """Compared with a table whose row of a letter that the prompt has in the same place holds the vector."""
    expected = []
    for tokenizer, encoder in (
        (vivid.tokenizer, vivid.text_encoder),
        (vivid.tokenizer_2, vivid.text_encoder_2),
    ):
        table = encoder.get_input_embeddings().weight
        row = tokenizer.convert_tokens_to_ids("z</w>")
        before = table[row].clone()
        try:
            table[row] = 0.5
            (ids,) = tokenizer(["a z z b"], padding="max_length", max_length=77, return_tensors="pt").input_ids[None]
            with torch.no_grad():
                expected.append(encoder(ids, output_hidden_states=True))
        finally:
            table[row] = before
    result = ours(vivid, "a EMB b", embeddings=Values(vivid))
    states = torch.cat([output.hidden_states[-2] for output in expected], -1)
    torch.testing.assert_close(result.states, states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.pooled, expected[1][0], rtol=1e-4, atol=1e-5)


def test_nothing_stays_of_vectors(vivid) -> None:
    before = ours(vivid, "a cat").states
    assert not torch.equal(ours(vivid, "a EMB", embeddings=Values(vivid)).states, ours(vivid, "a EMB").states)
    assert torch.equal(ours(vivid, "a cat").states, before)
    wrong = Values(vivid)
    wrong.of["text_encoder"] = torch.ones(2, 5)
    with pytest.raises(RuntimeError):
        ours(vivid, "a EMB", embeddings=wrong)
    for encoder in (vivid.text_encoder, vivid.text_encoder_2):
        assert not encoder.get_input_embeddings()._forward_hooks


def test_weights_out_of_range_are_refused(vivid) -> None:
    text = "a (cat:" + "9" * 60 + ")"
    with pytest.raises(InvalidRequest, match="too large for this model"):
        ours(vivid, text, "no_norm")
    ours(vivid, "a (cat:" + "9" * 30 + ")", "original")


def test_layers_that_are_not_there_are_refused(vivid) -> None:
    ours(vivid, "a", "original", 5)
    with pytest.raises(InvalidRequest, match="clip_skip must be at most 5 with this model, not 6"):
        ours(vivid, "a", "original", 6)
