"""Several pictures in one request: each is the one that its seed and prompt draw alone, in picture, text and answer."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.generate.refiner import Refiner, load_refiner
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.serving import delivery
from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from sdxl_worker.worker import Worker
from tests.support.embedding_files import save_embedding, vectors

SMALL = {"width": 64, "height": 64, "num_inference_steps": 3, "scheduler": "K_EULER", "prompt_syntax": "a1111"}
LONG = "fog over the sea, " * 12


@pytest.fixture(scope="module")
def engine_of_vivid(vivid) -> LoraEngine:
    return LoraEngine(vivid, 2**30)


@pytest.fixture(scope="module")
def refiner(vivid) -> Refiner | None:
    return load_refiner(Settings(refiner_id="tiny"), vivid)


@pytest.fixture
def worker(vivid, engine_of_vivid: LoraEngine, refiner: Refiner | None, tmp_path: Path, monkeypatch) -> Worker:
    worker = Worker(Settings(model_id="tiny", refiner_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(tmp_path / "loras")
    worker.resident.use(vivid, refiner)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine_of_vivid)
    return worker


def answer_to(worker: Worker, **fields: Any) -> dict[str, Any]:
    return worker.run({"id": "job", "input": {**SMALL, **fields}})


def opened(answer: dict[str, Any], index: int = 0) -> Image.Image:
    assert "images" in answer, answer
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][index].partition(",")[2])))


def assert_alike(worker: Worker, answer: dict[str, Any], index: int, **alone: Any) -> None:
    """The picture and its text are those of a request for it alone."""
    found, expected = opened(answer, index), opened(answer_to(worker, **alone))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1
    assert found.info["parameters"] == expected.info["parameters"]


def test_eight_pictures_are_those_of_seed_and_seed_plus_i(worker: Worker) -> None:
    answer = answer_to(worker, prompt="a cat", seed=2**64 - 3, num_images=8)
    seeds = [2**64 - 3, 2**64 - 2, 2**64 - 1, 0, 1, 2, 3, 4]
    assert (answer["seed"], answer["seeds"]) == (seeds[0], seeds)
    assert len(set(answer["images"])) == 8
    for index in (0, 3, 7):
        assert_alike(worker, answer, index, prompt="a cat", seed=seeds[index])


def test_a_list_of_seeds(worker: Worker) -> None:
    answer = answer_to(worker, prompt="a cat", seeds=[9, 2, 9])
    assert (answer["seed"], answer["seeds"]) == (9, [9, 2, 9])
    for index, seed in enumerate((9, 2, 9)):
        assert_alike(worker, answer, index, prompt="a cat", seed=seed)


def test_one_picture_has_no_list_of_seeds_in_its_answer(worker: Worker) -> None:
    assert "seeds" not in answer_to(worker, prompt="a cat", seed=1)
    assert answer_to(worker, prompt="a cat", seeds=[3])["seed"] == 3


@pytest.mark.parametrize("negative", [None, "", "(blur:1.4), grey", LONG])
def test_prompts_of_every_kind_in_one_request(negative: str | None, worker: Worker, vivid) -> None:
    """Plain, weighted, two chunks, three chunks, with an embedding, and one of them twice."""
    save_embedding(worker.settings.lora_cache_dir / "odd.safetensors", vectors(vivid, 3))
    prompts = ["a cat", "a (cat:1.5) in [fog]", "a dog BREAK snow", LONG * 2, "an odd house", "a cat"]
    common = {"negative_prompt": negative, "embeddings": ["odd"]}
    answer = answer_to(worker, prompts=prompts, seed=4, **common)
    assert answer["seeds"] == [4, 5, 6, 7, 8, 9]
    assert [entry["token"] for entry in answer["used_embeddings"]] == ["odd"]
    assert "warnings" not in answer
    assert ["TI hashes" in opened(answer, index).info["parameters"] for index in range(6)] == [
        *[False] * 4,
        True,
        False,
    ]
    for index, prompt in enumerate(prompts):
        assert_alike(worker, answer, index, prompt=prompt, seed=4 + index, **common)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


START = _data_uri(Image.linear_gradient("L").convert("RGB").resize((80, 64)))
MASK = _data_uri(Image.radial_gradient("L").point(lambda value: 255 * (value < 128)).resize((80, 64)))


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"loras": [{"path": "tiny-example", "end": 0.5}, {"path": "tiny-example", "start": 0.5, "scale": -1}]},
        {"image": START, "strength": 0.7},
        {"image": START, "mask": MASK},
        {"image": START, "mask": MASK, "inpaint_full_res": True},
        {"image": START, "extend": {"left": 16}},
        {"hires": {"scale": 1.5, "strength": 0.6}},
        {"hires": {"scale": 1.5, "strength": 0.6, "upscaler": "lanczos"}},
        {"refiner_inference_steps": 9},
        {"high_noise_frac": 0.6},
        {"scheduler": "DPM++ SDE"},
    ],
    ids=lambda mode: " ".join(name for name in mode if name != "image") or "text",
)
def test_prompts_and_seeds_in_every_mode_also_where_memory_runs_out(mode, worker: Worker, vivid, monkeypatch) -> None:
    """One prompt is for diffusers itself, one is weighted, one longer; two at once do not fit after the second step."""
    common = {"loras": ["tiny-example"], "num_inference_steps": 5, "negative_prompt": "fog", **mode}
    prompts, seeds = ["a cat", "a cat", "a (dog:1.4)", "a dog BREAK snow"], [5, 6, 5, 5]
    forward, sizes = vivid.unet.forward, []

    def runs_out(sample: Any, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(len(sample))
        if len(sample) > 2 and len(sizes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(vivid.unet, "forward", runs_out)
        answer = answer_to(worker, prompts=prompts, seeds=seeds, **common)
    assert "warnings" not in answer
    assert sizes[:4] == [4, 4, 4, 2]
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert_alike(worker, answer, index, prompt=prompt, seed=seed, **common)


def test_the_same_lora_tags_in_every_prompt(worker: Worker) -> None:
    prompts = ["a cat <lora:tiny-example:0.7>", "<lora:tiny-example:0.7> a dog"]
    answer = answer_to(worker, prompts=prompts, seed=3)
    assert [entry["scale"] for entry in answer["loras"]] == [0.7]
    for index, prompt in enumerate(prompts):
        assert_alike(worker, answer, index, prompt=prompt, seed=3 + index)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a <lora:x:1>", "a"], "prompts[1] has other lora tags than prompts[0]: one set of LoRAs is for all pictures"),
        (["a", "a", "<lora:x:1>"], "prompts[2] has other lora tags than prompts[0]"),
        (["<lora:x:1>", "<lora:x:0.5>"], "prompts[1] has other lora tags than prompts[0]"),
        (["a", "x " * 1501], "prompts[1] takes 21 chunks of 75 tokens and may take at most 20"),
    ],
)
def test_what_is_wrong_names_the_prompt(prompts: list[str], said: str, worker: Worker) -> None:
    assert answer_to(worker, prompts=prompts)["error"].startswith(f"INVALID_INPUT: {said}")


def test_notes_name_the_prompt(worker: Worker) -> None:
    answer = answer_to(worker, prompts=["a", "a (b:2)"], prompt_syntax="plain")
    (warning,) = answer["warnings"]
    assert warning.startswith("prompts[1] holds ")


def test_each_prompt_is_inspected(worker: Worker) -> None:
    answer = answer_to(worker, prompts=["a (cat:1.3)", "a"], negative_prompt="b", inspect_prompt=True)
    first, second = answer["inspection"]["prompts"]
    assert first[0]["text_encoder"][0] == ["a</w>", 1.0]
    assert first[0]["text_encoder_2"][1] == ["c", 1.3]
    assert second == [{name: [["a</w>", 1.0]] for name in ("text_encoder", "text_encoder_2")}]
    assert len(answer["inspection"]["negative_prompt"]) == 1
    assert "prompt" not in answer["inspection"]
    names = [line.split()[0] for line in answer["table"].splitlines()]
    assert names == ["prompt", *["prompts[0]"] * 3, "prompts[1]", "negative_prompt"]


def test_eight_pictures_count_in_the_answer_s_size(worker: Worker, monkeypatch) -> None:
    png = answer_to(worker, prompt="a cat", seed=1, num_images=8)
    monkeypatch.setattr(worker, "answer_limit", lambda _: len(json.dumps(png)) - 1)
    assert answer_to(worker, prompt="a cat", seed=1, num_images=8)["error"].startswith("RESPONSE_TOO_LARGE: ")
    answer = answer_to(worker, prompt="a cat", seed=1, num_images=8, output_format="auto")
    assert [opened(answer, index).format for index in range(8)] == ["JPEG"] * 8
    assert len(json.dumps(answer)) < len(json.dumps(png))


def test_saved_pictures_of_one_seed_have_names_of_their_own(worker: Worker, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(delivery, "LOCAL_OUTPUT", tmp_path)
    worker.mode = Mode.LOCAL
    answer = answer_to(worker, prompts=["a cat", "a dog", "a fox"], seeds=[5, 6, 5])
    assert [Path(path).name for path in answer["images"]] == ["job_5.png", "job_6.png", "job_5_2.png"]
    texts = [Image.open(path).info["parameters"].splitlines()[0] for path in answer["images"]]
    assert texts == ["a cat", "a dog", "a fox"]
