"""Where embeddings are found in prompts, and pictures of them against textual inversion as a changed token table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.generate.modes import Inputs
from sdxl_worker.generate.render import render
from sdxl_worker.prompts.embeddings import Embedding, PromptEmbeddings
from sdxl_worker.prompts.reading import tokenizers_of
from sdxl_worker.prompts.vectors import ENCODERS, Vectors
from sdxl_worker.request import GenerationRequest
from tests.support.embedding_files import vectors, with_words, word
from tests.support.plain_sdxl import Chunks, encoded, picture

NOTHING = (torch.zeros(1, 16), torch.zeros(1, 24))
SHAPE = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 3, "scheduler": "K_EULER"}


def embedding(token: str, of=NOTHING, index: int = 0, **fields) -> Embedding:
    file = AssetFile(Path(__file__), "file.safetensors", "file", "a" * 64, 1)
    return Embedding(token, dict(zip(ENCODERS, of, strict=True)), file, f"embeddings[{index}]", **fields)


def parts(tokens: list[str], text: str) -> list[str]:
    """The text in parts, an embedding as its token in braces."""
    found = PromptEmbeddings(embedding(token) for token in tokens).split(text, "text_encoder")
    return [f"{{{part.name}}}" if isinstance(part, Vectors) else part for part in found]


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (["cat"], "a cat, cats, caterpillar, bobcat", ["a ", "{cat}", ", cats, caterpillar, bobcat"]),
        (["Cat"], "CAT cat", ["{Cat}", " ", "{Cat}"]),
        (["bad-hands 5"], "x bad-hands 5, y", ["x ", "{bad-hands 5}", ", y"]),
        (["my emb"], "my  emb, myemb, my\nemb", ["{my emb}", ", myemb, ", "{my emb}"]),
        (["emb1"], "emb12 emb1", ["emb12 ", "{emb1}"]),
        (["emb", "emb_v2"], "emb_v2 emb", ["{emb_v2}", " ", "{emb}"]),
        (["a(b)[c]"], "(a(b)[c])", ["(", "{a(b)[c]}", ")"]),
        (["<s0>", "<s1>"], "of <s0><s1>, oil", ["of ", "{<s0>}", "{<s1>}", ", oil"]),
        (["café"], "CAFÉ cafés", ["{café}", " cafés"]),
        (["*"], "a*b", ["a", "{*}", "b"]),
        (["cat"], "", [""]),
        ([], "a cat", ["a cat"]),
    ],
)
def test_a_token_is_found_where_its_whole_sequence_stands(tokens: list[str], text: str, expected: list[str]) -> None:
    assert parts(tokens, text) == expected


def test_two_embeddings_of_one_token_are_said() -> None:
    found = PromptEmbeddings([embedding("My emb"), embedding("my  EMB", index=1)])
    assert found.notes == ["embeddings[1]: the token 'my  EMB' stands for the embedding of embeddings[0]"]
    assert len(found.embeddings) == 1


def test_more_than_64_are_said() -> None:
    found = PromptEmbeddings(embedding(f"e{index}", index=index) for index in range(66))
    assert len(found.embeddings) == 64
    assert found.notes == [f"embeddings[{index}]: 'e{index}' is one embedding too many" for index in (64, 65)]


def test_a_search_takes_time_linear_in_the_text() -> None:
    """A search that went back over what it has read would not end: 64 tokens that almost match, 10,000 characters."""
    found = PromptEmbeddings(embedding("x " * 90 + f"e{index}") for index in range(64))
    assert list(found.split("x " * 5000, "text_encoder")) == ["x " * 5000]
    assert list(found.split("x" + " " * 9999, "text_encoder")) == ["x" + " " * 9999]


def asked(prompt: str, negative: str | None = None, syntax: str = "a1111", **fields) -> GenerationRequest:
    return GenerationRequest(prompt, negative_prompt=negative, prompt_syntax=syntax, **{**SHAPE, **fields})


def apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


ONE, EIGHT = word("one", 1), word("eight", 8)
# prompt, the chunks that its formula has, syntax
PROMPTS: dict[str, tuple[str, Chunks, str]] = {
    "one vector": ("a one cat", [[(f"a {ONE} cat", 1)]], "a1111"),
    "eight vectors": ("a eight cat", [[(f"a {EIGHT} cat", 1)]], "a1111"),
    "twice": ("eight, eight", [[(f"{EIGHT}, {EIGHT}", 1)]], "a1111"),
    "weights": ("a (eight cat:1.4) [one]", [[("a ", 1), (f"{EIGHT} cat", 1.4), (" ", 1), (ONE, 1 / 1.1)]], "a1111"),
    "the last place": ("x " * 74 + "one", [[("x " * 74 + ONE, 1)]], "a1111"),
    "after the last place": ("x " * 75 + "one", [[("x " * 75, 1)], [(ONE, 1)]], "a1111"),
    "eight fit": ("x " * 67 + "eight y", [[("x " * 67 + EIGHT, 1)], [("y", 1)]], "a1111"),
    "eight never straddle": ("x " * 68 + "eight y", [[("x " * 68, 1)], [(EIGHT + " y", 1)]], "a1111"),
    "plain": ("a eight (cat:1.5)", [[(f"a {EIGHT} (cat:1.5)", 1)]], "plain"),
    "plain, eight fit": ("x " * 67 + "eight y", [[("x " * 67 + EIGHT, 1)]], "plain"),
    "plain, cut before": ("x " * 68 + "eight y", [[("x " * 68, 1)]], "plain"),
}


@pytest.fixture(scope="module")
def known(vivid):
    """The embeddings `one` and `eight`, and the pipeline in which they are words."""
    one, eight = vectors(vivid, 1), vectors(vivid, 8)
    found = PromptEmbeddings([embedding("one", one), embedding("eight", eight, 1)])
    return found, with_words(vivid, one=one, eight=eight)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_picture_is_that_of_a_token_table_with_the_vectors(name: str, vivid, known) -> None:
    (found, changed), (prompt, chunks, syntax) = known, PROMPTS[name]
    ours = np.asarray(render(vivid, asked(prompt, "bad hands", syntax), embeddings=found)[0])
    texts = (encoded(changed, chunks), encoded(changed, [[("bad hands", 1)]]))
    assert apart(ours, picture(changed, *texts, seed=3, steps=4, guidance=5.5, side=64)) <= 1


def test_in_the_negative_prompt_too(vivid, known) -> None:
    found, changed = known
    ours = np.asarray(render(vivid, asked("a cat", "eight, blur"), embeddings=found)[0])
    texts = (encoded(changed, [[("a cat", 1)]]), encoded(changed, [[(f"{EIGHT}, blur", 1)]]))
    assert apart(ours, picture(changed, *texts, seed=3, steps=4, guidance=5.5, side=64)) <= 1
    without = np.asarray(render(vivid, asked("a cat", "eight, blur"))[0])
    assert apart(ours, without) > 5, "the embedding has to show"


def test_nothing_of_the_pipeline_changes(vivid, known) -> None:
    def state() -> list[torch.Tensor]:
        encoders = (vivid.text_encoder, vivid.text_encoder_2)
        return [value.clone() for encoder in encoders for value in (*encoder.parameters(), *encoder.buffers())]

    plain = asked("a cat, oil painting", syntax="plain", strength=0.6)
    before, places = state(), [value.data_ptr() for value in vivid.text_encoder.parameters()]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers_of(vivid).values()]
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    requests = [dataclasses.replace(plain, prompt_syntax=syntax) for syntax in ("plain", "a1111")]
    inputs: tuple[Inputs, ...] = ({}, {"image_url": start})
    first = [np.asarray(render(vivid, plain, inputs=pictures)[0]) for pictures in inputs]
    render(vivid, asked("a eight, (one:1.3)", "eight"), embeddings=known[0])
    with pytest.raises(RuntimeError, match="size"):
        render(vivid, asked("bad"), embeddings=PromptEmbeddings([embedding("bad", vectors(vivid, 2)[::-1])]))
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    assert places == [value.data_ptr() for value in vivid.text_encoder.parameters()]
    assert vocabularies == [tokenizer.get_vocab() for tokenizer in tokenizers_of(vivid).values()]
    for request in requests:
        again = [np.asarray(render(vivid, request, inputs=pictures)[0]) for pictures in inputs]
        assert np.array_equal(again, first)


def test_which_are_used(vivid, known) -> None:
    found, tokenizers = known[0], tokenizers_of(vivid)
    one, eight = found.embeddings
    assert found.used_by(asked("a cat"), tokenizers) == ()
    assert found.used_by(asked("eight", "one"), tokenizers) == (one, eight)
    assert found.used_by(asked("x " * 75 + "one", syntax="plain"), tokenizers) == ()
    assert found.notes_on((one,)) == ["embeddings[1]: no prompt uses the embedding 'eight'"]
    with pytest.raises(InvalidRequest, match="negative_prompt takes 21 chunks"):
        found.used_by(asked("a", "x " * 1501), tokenizers)
