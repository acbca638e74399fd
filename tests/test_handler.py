"""One job through generate_image and the async handler, in this process, with faults put in its way."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import handler
from sdxl_worker.errors import RestoreFailed
from sdxl_worker.generate.render import render
from sdxl_worker.job_run import Denoising, JobRun, ProgressEvent
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings
from sdxl_worker.topology import EXAMPLE_LORA, write_example_lora
from sdxl_worker.validation import validate_request
from sdxl_worker.worker import Worker

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
WITH_LORA = {**SMALL, "loras": [{"path": "tiny-example", "scale": 0.8}]}


@pytest.fixture
def resident(pipeline, engine: LoraEngine, tmp_path, monkeypatch) -> Worker:
    """The handler's resident: the session's pipeline, and a cache folder with the example LoRA."""
    resident = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(resident.settings.lora_cache_dir)
    resident._pipeline = pipeline
    monkeypatch.setattr(resident, "engine_of", lambda _: engine)
    monkeypatch.setattr(handler, "_worker", lambda: resident)
    monkeypatch.setattr(handler, "_sdk_config", functools.cache(dict))
    return resident


def job(**fields: Any) -> dict[str, Any]:
    return {"id": "job", "input": {**SMALL, **fields}}


def picture(answer: dict[str, Any], index: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][index].partition(",")[2])))


def weights(pipeline) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in pipeline.unet.parameters()]).clone()


def test_a_plain_answer_is_what_the_pipeline_renders(resident):
    answer = handler.generate_image(job())
    assert set(answer) == {"images", "image_url", "seed"}
    assert answer["image_url"] == answer["images"][0]
    assert answer["seed"] == 5
    expected = render(resident.pipeline, validate_request(SMALL))[0]
    assert (np.asarray(picture(answer)) == np.asarray(expected)).all()
    assert "Seed: 5, Size: 64x64, Model: tiny" in picture(answer).info["parameters"]


def test_a_request_without_loras_touches_no_lora_code(resident, monkeypatch):
    monkeypatch.setattr(resident, "engine_of", None)
    assert "images" in handler.generate_image(job())


def test_the_second_picture_can_be_had_alone(resident):
    both = handler.generate_image(job(num_images=2))
    assert len(both["images"]) == 2
    alone = handler.generate_image(job(seed=6))
    assert "Seed: 6," in picture(both, 1).info["parameters"]
    np.testing.assert_allclose(np.asarray(picture(both, 1)).astype(int), np.asarray(picture(alone)), atol=1)


def test_loras_are_applied_reported_and_taken_away(resident):
    before, plain = weights(resident.pipeline), handler.generate_image(job())
    answer = handler.generate_image({"input": WITH_LORA})
    (entry,) = answer["loras"]
    assert (entry["name"], entry["scale"], entry["rank"], entry["base_model"]) == (EXAMPLE_LORA, 0.8, 4, "SDXL")
    assert len(entry["sha256"]) == 64
    assert entry["layers_applied"] > 100
    assert "<lora:tiny-example:0.8>" in picture(answer).info["parameters"]
    assert f'Lora hashes: "tiny-example: {entry["sha256"][:10]}"' in picture(answer).info["parameters"]
    assert answer["images"] != plain["images"]
    assert torch.equal(weights(resident.pipeline), before)
    assert handler.generate_image(job())["images"] == plain["images"]


def test_scale_0_costs_nothing_and_is_not_listed(resident, monkeypatch):
    plain = handler.generate_image(job())
    monkeypatch.setattr(resident, "engine_of", lambda _: pytest.fail("the LoRA engine was asked for"))
    answer = handler.generate_image(job(loras=[{"path": "https://example.com/x.safetensors", "scale": 0}]))
    assert answer["images"] == plain["images"]
    assert answer["loras"] == []
    assert handler.generate_image(job(loras=[{"path": "../x", "scale": 0}]))["error"].startswith("LORA_REFERENCE: ")


def test_skipped_entries_and_ignored_fields_are_named(resident):
    answer = handler.generate_image(job(loras=[None], high_noise_frac=0.8))
    assert answer["loras"] == []
    assert [warning.split()[0] for warning in answer["warnings"]] == ["loras[0]", "high_noise_frac"]


@pytest.mark.parametrize(
    ("bad_job", "code"),
    [
        ({}, "INVALID_INPUT"),
        ({"input": None}, "INVALID_INPUT"),
        ([], "INVALID_INPUT"),
        (job(loras=["none"]), "LORA_NOT_FOUND"),
        (job(loras=["file:///etc/passwd"]), "LORA_REFERENCE"),
        (job(loras=["a\0b"]), "LORA_REFERENCE"),
        (job(image_url="http://127.0.0.1:9/x.png", strength=1), "BLOCKED_ADDRESS"),
    ],
)
def test_errors_are_a_code_and_a_sentence(resident, bad_job, code):
    answer = handler.generate_image(bad_job)
    assert set(answer) == {"error"}
    assert answer["error"].startswith(f"{code}: ")
    assert json.dumps(answer).isascii()
    assert resident.turns.ticket().is_first


def test_row_40_second_lora_is_bad(resident):
    before = weights(resident.pipeline)
    (resident.settings.lora_cache_dir / "bad.safetensors").write_bytes(b"<html>")
    answer = handler.generate_image(job(loras=["tiny-example", "bad"]))
    assert answer["error"].split(":")[0] in ("NOT_A_LORA", "BAD_FILE")
    assert torch.equal(weights(resident.pipeline), before)


def failing_at_step(resident: Worker, monkeypatch, step: int, error: BaseException) -> None:
    """The UNet raises `error` in its `step`-th call."""
    calls = iter(range(1, 1000))
    forward = resident.pipeline.unet.forward

    def broken(*arguments, **options):
        if next(calls) == step:
            raise error
        return forward(*arguments, **options)

    monkeypatch.setattr(resident.pipeline.unet, "forward", broken)


def test_row_49_out_of_memory_at_a_step(resident, monkeypatch):
    before, plain = weights(resident.pipeline), handler.generate_image(job())
    for count in (1, 2):
        failing_at_step(resident, monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
        answer = handler.generate_image({"input": WITH_LORA})

        assert answer["error"].startswith("OUT_OF_MEMORY: ")
        assert answer.get("refresh_worker", False) is (count == 2)
    assert torch.equal(weights(resident.pipeline), before)
    failing_at_step(resident, monkeypatch, 999, MemoryError())
    assert handler.generate_image(job())["images"] == plain["images"]


def test_row_50_a_cuda_error_asks_for_a_fresh_worker_and_no_job_runs_here_any_more(resident, monkeypatch):
    failing_at_step(resident, monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    for _ in range(2):
        answer = handler.generate_image(job())
        assert answer["error"].startswith("DEVICE_FAILED: ")
        assert answer["refresh_worker"] is True


def test_a_failed_restore_asks_for_a_fresh_worker(resident, engine, monkeypatch):
    def lost() -> None:
        raise RestoreFailed("lost")

    monkeypatch.setattr(engine, "restore", lost)
    answer = handler.generate_image({"input": WITH_LORA})
    assert answer == {"error": "RESTORE_FAILED: lost", "refresh_worker": True}
    assert handler.generate_image(job()) == {"error": "RESTORE_FAILED: lost", "refresh_worker": True}


def test_an_unforeseen_error_shows_nothing_and_is_logged(resident, monkeypatch, caplog):
    failing_at_step(resident, monkeypatch, 1, KeyError("/private/path"))
    answer = handler.generate_image(job())
    assert answer["error"].startswith("INTERNAL: ")
    assert "private" not in answer["error"]
    assert "/private/path" in caplog.text


def test_the_first_lora_is_taken_away_when_merging_fails_behind_it(resident, engine, monkeypatch):
    before, apply = weights(resident.pipeline), engine.apply

    def half_way(loras: Any) -> None:
        apply(loras)
        raise RuntimeError("half-way")

    monkeypatch.setattr(engine, "apply", half_way)
    assert handler.generate_image({"input": WITH_LORA})["error"].startswith("INTERNAL: ")
    assert torch.equal(weights(resident.pipeline), before)


def test_row_53_too_large(resident, monkeypatch):
    monkeypatch.setattr(resident, "answer_limit", lambda _: 12_000)
    assert handler.generate_image(job())["error"].startswith("RESPONSE_TOO_LARGE: ")
    answer = handler.generate_image(job(output_format="auto", output_quality=60))
    assert picture(answer).format == "JPEG"
    assert "as png the answer would have been too large" in answer["warnings"][0]


def test_auto_is_png_when_it_fits(resident):
    assert picture(handler.generate_image(job(output_format="auto"))).format == "PNG"


def test_row_48_half_a_bucket_fails_before_any_work(resident, monkeypatch):
    monkeypatch.setattr(
        resident, "settings", Settings(bucket_endpoint_url="http://x", lora_cache_dir=resident.settings.lora_cache_dir)
    )
    failing_at_step(resident, monkeypatch, 1, AssertionError("rendered"))
    answer = handler.generate_image(job(loras=["not-there"]))
    assert answer["error"].startswith("UPLOAD_FAILED: the bucket is only half configured: set BUCKET_ACCESS_KEY_ID")


def test_a_stopped_job_ends_at_the_next_step_and_restores(resident, monkeypatch):
    before = weights(resident.pipeline)
    run = resident.start_run({"id": "stopped"})
    seen = []

    class Stop:
        def update(self, event: ProgressEvent) -> None:
            step = event.step if isinstance(event, Denoising) else None
            if step == 1:
                run.cancel()
            seen.append((event.name, step))

        def close(self) -> None:
            seen.append(("closed", None))

    run.progress = Stop()
    answer = handler.generate_image({"input": {**WITH_LORA, "num_inference_steps": 50}}, run)
    assert answer["error"].startswith("CANCELLED: ")
    assert [step for _, step in seen if step] == [1]
    assert seen[-1][0] == "closed"
    assert torch.equal(weights(resident.pipeline), before)


def test_the_log_line_has_the_stages(resident, caplog):
    caplog.set_level("INFO")
    handler.generate_image({"id": "logged", "input": WITH_LORA})
    line = next(record.message for record in caplog.records if record.message.startswith("job {"))
    facts = json.loads(line.removeprefix("job "))
    assert facts["job"] == "logged"
    assert facts["outcome"] == "ok"
    assert facts["loras"] == ["tiny-example"]
    assert facts["cache_hits"] == 1
    before = ("validating", "downloading", "loading_loras", "queued", "applying_loras")
    stages = (*before, "denoising", "restoring", "encoding", "last_update")
    assert set(facts["ms"]) == {*stages, "total"}
    assert sum(facts["ms"][stage] for stage in stages) <= facts["ms"]["total"] + 1


def test_the_original_helpers(resident, engine):
    before = weights(resident.pipeline)
    paths, scales = handler._load_loras(resident.pipeline, [{"path": "tiny-example", "scale": 0.5}, None])
    assert [path.name for path in paths] == [EXAMPLE_LORA]
    assert scales[0].unet == 0.5
    handler._apply_loras_to_pipeline(resident.pipeline, paths, scales)
    changed = weights(resident.pipeline)
    assert not torch.equal(changed, before)
    handler._apply_loras_to_pipeline(resident.pipeline, list(paths), [0.5])
    assert torch.equal(weights(resident.pipeline), changed)
    handler._unload_loras_from_pipeline(resident.pipeline)
    assert torch.equal(weights(resident.pipeline), before)


@pytest.fixture
def slow_job(resident, monkeypatch):
    """generate_image that waits to be stopped or released, and tells when it has ended."""
    state = {"started": threading.Event(), "release": threading.Event(), "ended": threading.Event()}

    def generate(job: dict[str, Any], run: JobRun) -> dict[str, Any]:
        state["started"].set()
        while not run.should_stop() and not state["release"].is_set():
            state["release"].wait(0.01)
        # Stopping takes its time.
        while not state["release"].is_set():
            state["release"].wait(0.01)
        run.finish("test")
        state["ended"].set()
        return {"seed": 1, "refresh_worker": job.get("refresh")}

    monkeypatch.setattr(handler, "generate_image", generate)
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(handler, "_threads", lambda: pool)
        yield state
        state["release"].set()


def test_row_52_a_stopped_job_is_awaited_however_often_it_is_stopped(slow_job):
    async def scenario() -> None:
        task = asyncio.create_task(handler.handler({"id": "a"}))
        await asyncio.to_thread(slow_job["started"].wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        slow_job["release"].set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow_job["ended"].is_set()

    asyncio.run(scenario())


def test_the_event_loop_is_free_while_a_job_runs(slow_job):
    async def scenario() -> None:
        task = asyncio.create_task(handler.handler({"id": "a"}))
        await asyncio.to_thread(slow_job["started"].wait, 10)
        slow_job["release"].set()
        assert (await task)["seed"] == 1

    asyncio.run(scenario())
    assert "refresh_worker" not in handler._sdk_config()


def test_an_answer_that_asks_for_a_fresh_worker_ends_this_one(slow_job):
    slow_job["release"].set()
    asyncio.run(handler.handler({"id": "a", "refresh": True}))
    assert handler._sdk_config()["refresh_worker"] is True


def test_progress_goes_to_runpod_in_production_only(resident):
    assert type(resident.start_run({"id": "a"}).progress).__name__ == "NoProgress"
    resident.mode = Mode.PRODUCTION
    assert type(resident.start_run({"id": "a"}).progress).__name__ == "RunPodProgress"
    resident.mode = Mode.LOCAL
    assert type(resident.start_run({"id": "a"}).progress).__name__ == "BarProgress"
    assert resident.answer_limit("a") is None
