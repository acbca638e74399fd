"""Embeddings and lora tags in whole requests: pictures, what the answer says of them, and the bits afterwards."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.embedding_files import save_embedding, vectors, with_words, word
from tests.support.lora_files import save
from tests.support.lora_styles import merged_by_hand, styled_file
from tests.support.plain_sdxl import Chunks, encoded, picture

SMALL = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 4, "seed": 3, "scheduler": "K_EULER"}


@pytest.fixture(scope="module")
def engine_of_vivid(vivid) -> LoraEngine:
    return LoraEngine(vivid, 2**30)


@pytest.fixture
def worker(vivid, engine_of_vivid: LoraEngine, tmp_path: Path, monkeypatch) -> Worker:
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    (tmp_path / "loras").mkdir()
    worker.resident.use(vivid)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine_of_vivid)
    return worker


def folder(worker: Worker) -> Path:
    return worker.settings.lora_cache_dir


def answer_to(worker: Worker, **fields: Any) -> dict[str, Any]:
    return worker.run({"id": "job", "input": {**SMALL, "prompt_syntax": "a1111", **fields}})


def opened(answer: dict[str, Any]) -> Image.Image:
    assert "images" in answer, answer
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2])))


def expected(pipeline: Any, chunks: Chunks) -> np.ndarray:
    return picture(pipeline, encoded(pipeline, chunks), None, seed=3, steps=4, guidance=5.5, side=64)


def apart(answer: dict[str, Any], other: np.ndarray) -> int:
    return int(np.abs(np.asarray(opened(answer)).astype(int) - other.astype(int)).max())


def test_an_embedding_of_the_request(worker: Worker, vivid) -> None:
    of = vectors(vivid, 8)
    save_embedding(folder(worker) / "bad-hands.safetensors", of)
    save_embedding(folder(worker) / "spare.safetensors", vectors(vivid, 1))
    asked = [{"path": "bad-hands"}, {"path": "bad-hands.safetensors", "token": "(odd one)"}, "spare"]
    answer = answer_to(worker, prompt=r"a bad-hands (\(odd one\):1.3)", embeddings=asked)
    chunks: Chunks = [[(f"a {word('v', 8)} ", 1), (word("v", 8), 1.3)]]
    assert apart(answer, expected(with_words(vivid, v=of), chunks)) <= 1
    assert [(entry["token"], entry["name"], entry["vectors"]) for entry in answer["used_embeddings"]] == [
        ("bad-hands", "bad-hands.safetensors", 8),
        ("(odd one)", "bad-hands.safetensors", 8),
    ]
    assert answer["warnings"] == ["embeddings[2]: no prompt uses the embedding 'spare'"]
    text = opened(answer).info["parameters"]
    short = answer["used_embeddings"][0]["sha256"][:12]
    assert f'TI hashes: "bad-hands: {short}, (odd_one): {short}"' in text


@pytest.mark.parametrize("names", ["{}.clip_{}", "{}.string_to_param.clip_{}"])
def test_embeddings_bundled_in_a_lora_need_no_entry(names: str, worker: Worker, vivid) -> None:
    of, (tensors, changes) = vectors(vivid, 2), styled_file(vivid, "kohya, SDXL names")
    bundled = {f"bundle_emb.{names.format('my.style', part)}": one for part, one in zip("lg", of, strict=True)}
    odd = {"bundle_emb.old.string_to_param.*": torch.ones(1, 768), "bundle_emb.spare.clip_l": of[0]}
    spare = {"bundle_emb.spare.clip_g": of[1], "bundle_emb.out.clip_l_out": of[0]}
    save(folder(worker) / "lora.safetensors", tensors | bundled | odd | spare)
    answer = answer_to(worker, prompt="a my.style cat", loras=[{"path": "lora", "scale": 0.5}])
    by_hand = with_words(merged_by_hand(vivid, [(changes, 0.5)]), v=of)
    assert apart(answer, expected(by_hand, [[(f"a {word('v', 2)} cat", 1)]])) <= 1
    (used,) = answer["used_embeddings"]
    assert (used["token"], used["name"], used["vectors"]) == ("my.style", "lora.safetensors", 2)
    assert [sentence.replace("loras[0]: ", "") for sentence in answer["warnings"]] == [
        "the bundled embedding 'old' is not applied: this embedding is for Stable Diffusion 1.5; this worker runs SDXL",
        "the bundled embedding 'out' is not applied: this embedding has vectors for one text encoder, 16 numbers wide; "
        "one for SDXL has two, 768 and 1280",
        "no prompt uses the embedding 'spare'",
    ]
    assert "TI hashes" not in opened(answer).info["parameters"]


@pytest.mark.parametrize(
    ("tag", "text", "unet"),
    [("<lora:lora:0.5>", 0.5, 0.5), ("<lora:lora>", 1.0, 1.0), ("<lora:lora:0.25:0.75>", 0.25, 0.75)],
)
def test_a_lora_tag(tag: str, text: float, unet: float, worker: Worker, vivid) -> None:
    tensors, changes = styled_file(vivid, "kohya, SDXL names")
    save(folder(worker) / "lora.safetensors", tensors)
    of_unet = {place: change for place, change in changes.items() if place[0] == "unet"}
    of_text = {place: change for place, change in changes.items() if place[0] != "unet"}
    answer = answer_to(worker, prompt=f"a {tag}(cat:1.2)")
    by_hand = merged_by_hand(vivid, [(of_unet, unet), (of_text, text)])
    assert apart(answer, expected(by_hand, [[("a ", 1), ("cat", 1.2)]])) <= 1
    assert [entry["name"] for entry in answer["loras"]] == ["lora.safetensors"]
    assert "warnings" not in answer
    parameters = opened(answer).info["parameters"]
    assert parameters.splitlines()[0] == f"a {tag}(cat:1.2)"
    assert 'Lora hashes: "lora: ' in parameters


def test_entries_come_before_tags_and_add_up(worker: Worker, vivid) -> None:
    for seed, name in enumerate(("first", "second")):
        save(folder(worker) / f"{name}.safetensors", styled_file(vivid, "diffusers", seed)[0])
    answer = answer_to(worker, prompt="a <lora:second:0.5>", loras=[{"path": "first", "scale": 0.25}])
    changes = [(styled_file(vivid, "diffusers", seed)[1], scale) for seed, scale in ((0, 0.25), (1, 0.5))]
    assert apart(answer, expected(merged_by_hand(vivid, changes), [[("a ", 1)]])) <= 1
    assert [entry["name"] for entry in answer["loras"]] == ["first.safetensors", "second.safetensors"]
    assert opened(answer).info["parameters"].splitlines()[0] == "a <lora:second:0.5> <lora:first:0.25>"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": "a <lora:absent:1>"}, "LORA_NOT_FOUND: the tag <lora:absent>: the LoRA cache holds no file"),
        ({"prompt": "a <lora:x:y:z>"}, "LORA_REFERENCE: the tag <lora:x>: the LoRA reference x is neither"),
        ({"prompt": "a <lora:emb:1>"}, "LORA_INCOMPATIBLE: the tag <lora:emb>: none of the file's 2 tensors belongs"),
        ({"negative_prompt": "<lora:x:1>"}, "INVALID_INPUT: negative_prompt holds the tag <lora:x>"),
        ({"embeddings": ["absent"]}, "EMBEDDING_NOT_FOUND: the embedding cache holds no file named absent"),
        ({"embeddings": ["civitai:1@2"]}, "INVALID_INPUT: embeddings[0] needs a token"),
        ({"embeddings": ["sd15"]}, "EMBEDDING_INCOMPATIBLE: this embedding is for Stable Diffusion 1.5"),
        ({"embeddings": ["emb"], "prompt": "emb " * 1501}, "INVALID_INPUT: prompt takes 21 chunks"),
    ],
)
def test_errors_name_what_they_are_about(fields: dict[str, Any], error: str, worker: Worker, vivid) -> None:
    save_embedding(folder(worker) / "emb.safetensors", vectors(vivid, 1))
    save(folder(worker) / "sd15.safetensors", {"string_to_param.*": torch.ones(1, 768)})
    answer = answer_to(worker, **fields)
    assert answer.get("error", "").startswith(error), answer


def test_tags_that_no_lora_is_behind_are_said(worker: Worker) -> None:
    answer = answer_to(worker, prompt="a <lyco:x:1><hypernet:y:1>", negative_prompt="<lyco:z>")
    assert answer["warnings"] == [
        "prompt: '<lyco:x:1>' is not supported and was left out",
        "prompt: '<hypernet:y:1>' is not supported and was left out",
        "negative_prompt: '<lyco:z>' is not supported and was left out",
    ]
    assert "loras" not in answer


def test_malformed_entries_are_skipped_and_named(worker: Worker) -> None:
    bad_tokens = [{"path": "a", "token": token} for token in (3, "\n", "x" * 201)]
    asked = [3, {}, {"path": 3}, *bad_tokens]
    answer = answer_to(worker, embeddings=asked)
    assert answer["used_embeddings"] == []
    assert answer["warnings"] == [
        "embeddings[0] was skipped: it is a number, not a string or an object with path and token",
        "embeddings[1] was skipped: it has no path",
        "embeddings[2] was skipped: its path is a number, not a string",
        "embeddings[3] was skipped: its token is a number, not a string",
        "embeddings[4] was skipped: its token has no character that could stand in a prompt",
        "embeddings[5] was skipped: its token has more than 200 characters",
    ]


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_a_plain_request_has_the_same_bits_after_any_of_them(syntax: str, worker: Worker, vivid) -> None:
    tensors, _ = styled_file(vivid, "kohya, SDXL names")
    of = vectors(vivid, 8)
    bundled = {f"bundle_emb.style.clip_{part}": one for part, one in zip("lg", of, strict=True)}
    save(folder(worker) / "lora.safetensors", tensors | bundled)
    save_embedding(folder(worker) / "emb.safetensors", of)
    save_embedding(folder(worker) / "nan.safetensors", (of[0] * torch.nan, of[1]))
    before = copy.deepcopy(vivid.text_encoder.state_dict())
    plain = answer_to(worker, prompt_syntax=syntax)
    assert "used_embeddings" not in plain
    for fields in (
        {"prompt": "a emb, (emb:1.4)", "embeddings": ["emb"], "num_images": 2},
        {"prompt": "a style <lora:lora:1>", "negative_prompt": "style"},
        {"prompt": "emb", "prompt_syntax": "plain", "embeddings": ["emb"]},
        {"embeddings": ["nan"]},
    ):
        answer = answer_to(worker, **fields)
        assert ("images" in answer) == (fields.get("embeddings") != ["nan"]), answer
        again = answer_to(worker, prompt_syntax=syntax)
        assert np.array_equal(np.asarray(opened(again)), np.asarray(opened(plain)))
    after = vivid.text_encoder.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def test_an_inspection_shows_the_vectors(worker: Worker, vivid) -> None:
    save_embedding(folder(worker) / "emb.safetensors", vectors(vivid, 2))
    answer = answer_to(worker, prompt="emb", embeddings=["emb"], inspect_prompt=True)
    assert answer["inspection"]["prompt"] == [
        {name: [["emb [1/2]", 1.0], ["emb [2/2]", 1.0]] for name in ("text_encoder", "text_encoder_2")}
    ]


def test_preloaded_embeddings_lie_in_the_cache(worker: Worker, vivid, caplog) -> None:
    save_embedding(folder(worker) / "emb.safetensors", vectors(vivid, 2))
    worker = Worker(Settings(lora_cache_dir=folder(worker), embedding_preload="emb, absent"))
    worker.resident.use(vivid)
    worker.preload()
    assert (folder(worker) / "emb.safetensors.json").is_file()
    assert [record.getMessage() for record in caplog.records] == [
        "preload: EMBEDDING_NOT_FOUND: the embedding cache holds no file named absent"
    ]
