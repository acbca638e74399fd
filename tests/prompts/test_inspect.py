"""How a prompt was read, over HTTP's answer and on the command line."""

from __future__ import annotations

import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.prompts.__main__ import main
from sdxl_worker.prompts.inspect import inspection
from sdxl_worker.prompts.vectors import ENCODERS, Vectors
from sdxl_worker.request import GenerationRequest

TOKENIZERS = dict(zip(ENCODERS, topology.tokenizers(), strict=True))


class OneWord:
    """EMB stands for two vectors."""

    def split(self, text: str, _encoder: str) -> list[str | Vectors]:
        before, _, after = text.partition("EMB")
        return [before, Vectors("EMB", torch.ones(2, 16)), after] if "EMB" in text else [text]


def test_each_token_has_its_chunk_and_weight() -> None:
    request = GenerationRequest("a (cat:1.3) BREAK EMB", negative_prompt="b", prompt_syntax="a1111")
    answer = inspection(request, TOKENIZERS, OneWord())
    first = [["a</w>", 1.0], ["c", 1.3], ["at</w>", 1.3]]
    second = [["EMB [1/2]", 1.0], ["EMB [2/2]", 1.0]]
    assert answer["inspection"] == {
        "prompt_syntax": "a1111",
        "prompt_emphasis": "original",
        "prompt": [dict.fromkeys(ENCODERS, first), dict.fromkeys(ENCODERS, second)],
        "negative_prompt": [{name: [["b</w>", 1.0]] for name in ENCODERS}],
    }
    rows = [line.split() for line in answer["table"].splitlines()]
    assert rows[1] == ["prompt", "1", "a</w>", "1", "a</w>", "1"]
    assert rows[2] == ["prompt", "1", "c", "1.3", "c", "1.3"]
    assert rows[-1] == ["negative_prompt", "1", "b</w>", "1", "b</w>", "1"]
    assert len(rows) == 7


def test_a_prompt_that_is_not_there() -> None:
    answer = inspection(GenerationRequest("a", prompt_syntax="plain"), TOKENIZERS)
    assert answer["inspection"]["negative_prompt"] is None
    assert len(answer["table"].splitlines()) == 2


def test_on_the_command_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MODEL_ID", "tiny")
    monkeypatch.setenv("PROMPT_SYNTAX", "a1111")
    assert main(["a (cat:1.3) <lyco:x:1>", "--negative", "b"]) == 0
    shown, warned = capsys.readouterr()
    assert shown.splitlines()[2].split() == ["prompt", "1", "c", "1.3", "c", "1.3"]
    assert "<lyco:x:1>" in warned
    assert main(["a (cat:1.3)", "--syntax", "plain"]) == 0
    assert "1.3 " not in capsys.readouterr().out
    assert main(["x " * 1501]) == 1
    assert capsys.readouterr().err == "prompt takes 21 chunks of 75 tokens and may take at most 20\n"


@pytest.mark.parametrize("model", ["folder", "nobody/there"])
def test_tokenizers_that_are_not_there_are_one_sentence(model: str, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MODEL_ID", str(tmp_path / model) if model == "folder" else model)
    assert main(["a"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_tokenizers_of_a_folder_are_taken(tmp_path, monkeypatch, capsys) -> None:
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), topology.tokenizers(), strict=True):
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setenv("MODEL_ID", str(tmp_path))
    assert main(["cat"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["prompt", "1", "c", "1", "c", "1"]
