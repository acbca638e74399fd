"""Jobs with the refiner through a Worker: answers, LoRAs, stops, and everything as before afterwards."""

from __future__ import annotations

import base64
import dataclasses
import io
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker.generate.render import render
from sdxl_worker.job_run import Denoising
from sdxl_worker.request import LoraScale
from sdxl_worker.request.validation import validate_request
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.lora_files import kohya, lora, save, weight_hash
from tests.support.pictures import same

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 5, "seed": 5}
GOES_ON = {**SMALL, "high_noise_frac": 0.6}
LORA = {"loras": [{"path": "tiny-example", "scale": 0.8}]}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker that loaded both models itself."""
    settings = Settings(model_id="tiny", refiner_id="tiny", lora_cache_dir=tmp_path_factory.mktemp("loras"))
    worker = Worker(settings)
    assert worker.pipeline is not None
    return worker


def test_a_job_without_the_refiner_does_not_wait_for_its_hash(worker: Worker, monkeypatch) -> None:
    """A file of gigabytes is hashed beside the first jobs: here that ends with an error for whoever waits."""
    loaded = worker.resident.refiner
    assert loaded is not None
    failed: Future[str] = Future()
    failed.set_exception(RuntimeError("waited for the hash"))
    monkeypatch.setattr(worker.resident, "_refiner", dataclasses.replace(loaded, hash=failed))
    assert "error" not in run(worker, **SMALL)
    assert "error" in run(worker, **GOES_ON)


def run(worker: Worker, **fields: Any) -> dict[str, Any]:
    return worker.run({"id": "job", "input": fields})


def picture_of(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2])))


def text_of(answer: dict[str, Any]) -> str:
    return picture_of(answer).info["parameters"]


def state(worker: Worker) -> tuple[str, list[torch.Tensor]]:
    assert worker.resident.refiner is not None
    return weight_hash(worker.pipeline), [
        value.clone() for value in worker.resident.refiner.pipeline.unet.state_dict().values()
    ]


def assert_as_before(worker: Worker, before: tuple[str, list[torch.Tensor]]) -> None:
    after = state(worker)
    assert after[0] == before[0]
    assert all(torch.equal(*pair) for pair in zip(after[1], before[1], strict=True))


def test_the_text_of_a_picture_names_the_refiner(worker: Worker) -> None:
    assert worker.resident.refiner is not None
    plain, refined = run(worker, **SMALL), run(worker, **GOES_ON, **LORA)
    assert "warnings" not in refined
    assert refined["loras"][0]["layers_applied"] > 0
    assert f"Refiner: {worker.resident.refiner.title}, Refiner switch at: 0.6" in text_of(refined)
    assert "Refiner" not in text_of(plain)


def test_a_lora_of_the_text_encoder_does_not_reach_the_refiners_words(worker: Worker) -> None:
    """Bit for bit what is drawn with words that were encoded before the LoRA was merged, and not after."""
    pipeline, refiner, folder = worker.pipeline, worker.resident.refiner, worker.settings.lora_cache_dir
    assert refiner is not None
    tensors: dict[str, torch.Tensor] = {}
    for name, module in pipeline.text_encoder_2.named_modules():
        if name.endswith(("q_proj", "fc1")):
            tensors |= kohya(name, lora(module.weight)[0], "lora_te2_")
    file = save(folder / "words.safetensors", tensors)
    answer = run(worker, **GOES_ON, loras=["words.safetensors"])
    request = validate_request(GOES_ON, "tiny")
    engine = worker.engine_of(pipeline)
    before = refiner.ready_for(request)
    with engine.applied([(engine.read(file), LoraScale())]):
        after = refiner.ready_for(request)
        expected, other = (render(pipeline, request, refining=refining)[0] for refining in (before, after))
    assert not same(expected, other)
    assert same(picture_of(answer), expected)


def test_all_is_as_before_after_pictures_stops_and_failures(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = state(worker), run(worker, **SMALL)["images"]
    for fields in (GOES_ON, {**SMALL, "refiner_inference_steps": 10}):
        refined = run(worker, **fields, **LORA)["images"]
        job = worker.start_run({"id": "job"})
        # The fourth step and all after it are the refiner's.
        monkeypatch.setattr(
            job.progress,
            "update",
            lambda event, job=job: job.cancel() if isinstance(event, Denoising) and event.step >= 4 else None,
            raising=False,
        )
        assert worker.run({"id": "job", "input": {**fields, **LORA}}, job)["error"].startswith("CANCELLED")
        with monkeypatch.context() as patch:
            assert worker.resident.refiner is not None
            patch.setattr(worker.resident.refiner.pipeline.unet, "forward", lambda *_, **__: 1 / 0)
            assert run(worker, **fields, **LORA)["error"].startswith("INTERNAL")
        assert_as_before(worker, before)
        assert run(worker, **SMALL)["images"] == plain
        assert run(worker, **fields, **LORA)["images"] == refined


def test_loras_for_the_refiner_alone_are_an_error(worker: Worker) -> None:
    picture = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(picture, "PNG")
    start = {"image": f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"}
    fields = {**SMALL, **start, "refiner_inference_steps": 10, "strength": 0.5}
    assert "images" in run(worker, **fields)
    assert run(worker, **fields, **LORA)["error"].startswith("INVALID_INPUT: LoRAs do not reach the refiner")
    tagged = {**fields, "prompt": "a <lora:tiny-example:1>", "prompt_syntax": "a1111"}
    assert run(worker, **tagged)["error"].startswith("INVALID_INPUT: LoRAs do not reach the refiner")
