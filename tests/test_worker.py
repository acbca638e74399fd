"""One job through a Worker in this process, with faults put in its way."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_worker.errors import ModelUnavailable, RestoreFailed
from sdxl_worker.generate.render import render
from sdxl_worker.job_run import Denoising, ProgressEvent
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request.validation import validate_request
from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings
from sdxl_worker.topology import EXAMPLE_LORA, write_example_lora
from sdxl_worker.worker import Worker

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
OUT_OF_MEMORY = "OUT_OF_MEMORY: not even one picture of this size fits the memory; ask for a smaller one"
WITH_LORA = {**SMALL, "loras": [{"path": "tiny-example", "scale": 0.8}]}


@pytest.fixture
def worker(pipeline, engine: LoraEngine, tmp_path, monkeypatch) -> Worker:
    """A worker with the session's pipeline, and a cache folder with the example LoRA."""
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(worker.settings.lora_cache_dir)
    worker.resident.use(pipeline)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    return worker


def job(**fields: Any) -> dict[str, Any]:
    return {"id": "job", "input": {**SMALL, **fields}}


def picture(answer: dict[str, Any], index: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][index].partition(",")[2])))


def weights(pipeline) -> torch.Tensor:
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    return torch.cat([parameter.flatten() for part in parts for parameter in part.parameters()]).clone()


def test_a_plain_answer_is_what_the_pipeline_renders(worker):
    answer = worker.run(job())
    assert set(answer) == {"images", "image_url", "seed"}
    assert answer["image_url"] == answer["images"][0]
    assert answer["seed"] == 5
    expected = render(worker.pipeline, validate_request(SMALL))[0]
    assert (np.asarray(picture(answer)) == np.asarray(expected)).all()
    assert "Seed: 5, Size: 64x64, Model: tiny" in picture(answer).info["parameters"]


def test_a_request_without_loras_touches_no_lora_code(worker, monkeypatch):
    monkeypatch.setattr(worker, "engine_of", None)
    assert "images" in worker.run(job())


def test_the_second_picture_can_be_had_alone(worker):
    both = worker.run(job(num_images=2))
    assert len(both["images"]) == 2
    alone = worker.run(job(seed=6))
    assert "Seed: 6," in picture(both, 1).info["parameters"]
    np.testing.assert_allclose(np.asarray(picture(both, 1)).astype(int), np.asarray(picture(alone)), atol=1)


def test_loras_are_applied_reported_and_taken_away(worker):
    before, plain = weights(worker.pipeline), worker.run(job())
    answer = worker.run({"input": WITH_LORA})
    (entry,) = answer["loras"]
    assert (entry["name"], entry["scale"], entry["rank"], entry["base_model"]) == (EXAMPLE_LORA, 0.8, 4, "SDXL")
    assert len(entry["sha256"]) == 64
    assert entry["layers_applied"] > 100
    assert "<lora:tiny-example:0.8>" in picture(answer).info["parameters"]
    data = (worker.settings.lora_cache_dir / EXAMPLE_LORA).read_bytes()
    auto_v3 = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    assert f'Lora hashes: "tiny-example: {auto_v3}"' in picture(answer).info["parameters"]
    assert answer["images"] != plain["images"]
    assert torch.equal(weights(worker.pipeline), before)
    assert worker.run(job())["images"] == plain["images"]


def test_a_lora_that_predicts_v_is_named_where_the_base_model_predicts_epsilon(worker, monkeypatch):
    folder = worker.settings.lora_cache_dir
    save_file(load_file(folder / EXAMPLE_LORA), folder / "v.safetensors", {"modelspec.prediction_type": "v"})
    request = job(loras=["v.safetensors", "tiny-example"])
    assert worker.run(request)["warnings"] == [
        "loras[0]: it was trained on a base model that predicts v, and this one predicts epsilon: the picture may be "
        "spoilt"
    ]
    predicts_v = EulerDiscreteScheduler.from_config(worker.pipeline.scheduler.config, prediction_type="v_prediction")
    monkeypatch.setattr(worker.pipeline, "scheduler", predicts_v)
    assert "warnings" not in worker.run(request)


def test_a_sampler_is_held_against_what_the_base_model_predicts(worker, monkeypatch):
    zero_snr = EulerDiscreteScheduler.from_config(
        worker.pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert "warnings" not in worker.run(job(scheduler="LMS"))
    monkeypatch.setattr(worker.pipeline, "scheduler", zero_snr)
    assert "warnings" not in worker.run(job(scheduler="Euler"))
    assert "leaves out the zero terminal SNR" in worker.run(job(scheduler="LMS"))["warnings"][0]
    error = worker.run(job(scheduler="DPM++ 2M Beta", num_inference_steps=28))["error"]
    assert error.startswith(
        "INVALID_INPUT: with this base model (zero terminal SNR) scheduler DPMSolverMultistep takes"
    )


def test_scale_0_costs_nothing_and_is_not_listed(worker, monkeypatch):
    plain = worker.run(job())
    monkeypatch.setattr(worker, "engine_of", lambda _: pytest.fail("the LoRA engine was asked for"))
    answer = worker.run(job(loras=[{"path": "https://example.com/x.safetensors", "scale": 0}]))
    assert answer["images"] == plain["images"]
    assert answer["loras"] == []
    assert worker.run(job(loras=[{"path": "../x", "scale": 0}]))["error"].startswith("LORA_REFERENCE: ")


def test_skipped_entries_and_ignored_fields_are_named(worker):
    answer = worker.run(job(loras=[None], high_noise_frac=0.8))
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
def test_errors_are_a_code_and_a_sentence(worker, bad_job, code):
    answer = worker.run(bad_job)
    assert set(answer) == {"error"}
    assert answer["error"].startswith(f"{code}: ")
    assert json.dumps(answer).isascii()
    assert worker.turns.ticket().is_first


def test_row_40_second_lora_is_bad(worker):
    before = weights(worker.pipeline)
    (worker.settings.lora_cache_dir / "bad.safetensors").write_bytes(b"<html>")
    answer = worker.run(job(loras=["tiny-example", "bad"]))
    assert answer["error"].split(":")[0] in ("NOT_A_LORA", "BAD_FILE")
    assert torch.equal(weights(worker.pipeline), before)


def failing_at_step(worker: Worker, monkeypatch, step: int, error: BaseException) -> None:
    """The UNet raises `error` in its `step`-th call."""
    calls = iter(range(1, 1000))
    forward = worker.pipeline.unet.forward

    def broken(*arguments, **options):
        if next(calls) == step:
            raise error
        return forward(*arguments, **options)

    monkeypatch.setattr(worker.pipeline.unet, "forward", broken)


def test_row_49_out_of_memory_at_a_step(worker, monkeypatch):
    before, plain = weights(worker.pipeline), worker.run(job())
    for count in (1, 2):
        failing_at_step(worker, monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
        answer = worker.run({"input": WITH_LORA})

        assert answer["error"].startswith("OUT_OF_MEMORY: ")
        assert answer.get("refresh_worker", False) is (count == 2)
    assert torch.equal(weights(worker.pipeline), before)
    failing_at_step(worker, monkeypatch, 999, MemoryError())
    assert worker.run(job())["images"] == plain["images"]


@pytest.mark.parametrize("method", ["read", "apply"])
def test_memory_that_a_lora_s_file_takes_never_ends_the_worker(worker, engine, monkeypatch, method):
    plain = worker.run(job())
    with monkeypatch.context() as patch:
        patch.setattr(engine, method, lambda *_: (_ for _ in ()).throw(MemoryError()))
        for _ in range(3):
            assert worker.run({"input": WITH_LORA}) == {"error": OUT_OF_MEMORY}
    assert worker.run(job())["images"] == plain["images"]
    # Nor does it count towards the two pictures in a row that do end it.
    failing_at_step(worker, monkeypatch, 1, MemoryError())
    assert "refresh_worker" not in worker.run(job())


def test_row_50_a_cuda_error_asks_for_a_fresh_worker_and_no_job_runs_here_any_more(worker, monkeypatch):
    failing_at_step(worker, monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    for _ in range(2):
        answer = worker.run(job())
        assert answer["error"].startswith("DEVICE_FAILED: ")
        assert answer["refresh_worker"] is True


def test_nothing_is_read_for_a_job_that_comes_after_the_device_was_lost(worker, engine, monkeypatch):
    """Page-locked memory is not to be had of it either, and the answer would be about that."""
    failing_at_step(worker, monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    lost = worker.run(job())
    monkeypatch.setattr(engine, "read", lambda _path: (_ for _ in ()).throw(MemoryError()))
    assert worker.run({"input": WITH_LORA}) == lost


def test_a_failed_restore_asks_for_a_fresh_worker(worker, engine, monkeypatch):
    def lost() -> None:
        raise RestoreFailed("lost")

    monkeypatch.setattr(engine, "restore", lost)
    answer = worker.run({"input": WITH_LORA})
    assert answer == {"error": "RESTORE_FAILED: lost", "refresh_worker": True}
    assert worker.run(job()) == {"error": "RESTORE_FAILED: lost", "refresh_worker": True}


def test_an_unforeseen_error_shows_nothing_and_is_logged(worker, monkeypatch, caplog):
    failing_at_step(worker, monkeypatch, 1, KeyError("/private/path"))
    answer = worker.run(job())
    assert answer["error"].startswith("INTERNAL: ")
    assert "private" not in answer["error"]
    assert "/private/path" in caplog.text


def test_the_first_lora_is_taken_away_when_merging_fails_behind_it(worker, engine, monkeypatch):
    before, apply = weights(worker.pipeline), engine.apply

    def half_way(loras: Any) -> None:
        apply(loras)
        raise RuntimeError("half-way")

    monkeypatch.setattr(engine, "apply", half_way)
    assert worker.run({"input": WITH_LORA})["error"].startswith("INTERNAL: ")
    assert torch.equal(weights(worker.pipeline), before)


def test_row_53_too_large(worker, monkeypatch):
    monkeypatch.setattr(worker, "answer_limit", lambda _: 12_000)
    assert worker.run(job())["error"].startswith("RESPONSE_TOO_LARGE: ")
    answer = worker.run(job(output_format="auto", output_quality=60))
    assert picture(answer).format == "JPEG"
    assert "as png the answer would have been too large" in answer["warnings"][0]


def test_auto_counts_the_whole_answer(worker, monkeypatch):
    plain = worker.run(job(num_images=2, output_format="png", loras=[{}]))
    # A byte less than this answer has: its pictures alone would fit, the first one's copy in image_url does not.
    monkeypatch.setattr(worker, "answer_limit", lambda _: len(json.dumps(plain)) - 1)
    answer = worker.run(job(num_images=2, output_format="auto", loras=[{}]))
    assert [picture(answer, index).format for index in (0, 1)] == ["JPEG", "JPEG"]
    assert "jpeg of quality 90" in answer["warnings"][-1]
    # Less than JPEG of the quality asked for takes: a lower one does.
    monkeypatch.setattr(worker, "answer_limit", lambda _: len(json.dumps(answer)) - 1000)
    assert "jpeg of quality 75" in worker.run(job(num_images=2, output_format="auto", loras=[{}]))["warnings"][-1]


@pytest.mark.parametrize("quality", [5, 95])
def test_output_quality_reaches_the_picture(worker, quality):
    stock = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stock, "JPEG", quality=quality)
    answer = worker.run(job(output_format="jpeg", output_quality=quality))
    assert picture(answer).quantization == Image.open(stock).quantization  # type: ignore[attr-defined]


def test_auto_is_png_when_it_fits(worker):
    assert picture(worker.run(job(output_format="auto"))).format == "PNG"


def test_row_48_half_a_bucket_fails_before_any_work(worker, monkeypatch):
    monkeypatch.setattr(
        worker, "settings", Settings(bucket_endpoint_url="http://x", lora_cache_dir=worker.settings.lora_cache_dir)
    )
    failing_at_step(worker, monkeypatch, 1, AssertionError("rendered"))
    answer = worker.run(job(loras=["not-there"]))
    assert answer["error"].startswith("UPLOAD_FAILED: the bucket is only half configured: set BUCKET_ACCESS_KEY_ID")


def test_a_stopped_job_ends_at_the_next_step_and_restores(worker, monkeypatch):
    before = weights(worker.pipeline)
    run = worker.start_run({"id": "stopped"})
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
    answer = worker.run({"input": {**WITH_LORA, "num_inference_steps": 50}}, run)
    assert answer["error"].startswith("CANCELLED: ")
    assert [step for _, step in seen if step] == [1]
    assert seen[-1][0] == "closed"
    assert torch.equal(weights(worker.pipeline), before)


@pytest.mark.parametrize(
    ("bad_job", "code"),
    [
        (job(width=7), "INVALID_INPUT"),
        (job(loras=["bad"]), "BAD_FILE"),
        (job(image_url="http://127.0.0.1:9/x.png", strength=1), "BLOCKED_ADDRESS"),
        (job(loras=["https://127.0.0.1:9/x.safetensors"]), "BLOCKED_ADDRESS"),
    ],
)
def test_a_caller_s_error_is_one_line_in_the_log(worker, bad_job, code, caplog):
    (worker.settings.lora_cache_dir / "bad.safetensors").write_bytes(b"\1" * 100)
    assert worker.run(bad_job)["error"].startswith(f"{code}: ")
    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert record.levelname == "WARNING"
    assert record.exc_info is None
    assert record.message.startswith(f"{code}: ")
    assert "\n" not in record.message


def test_a_fault_of_the_worker_has_its_traceback(worker, monkeypatch, caplog):
    failing_at_step(worker, monkeypatch, 1, RuntimeError("CUDA error: 700"))
    worker.run(job())
    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert (record.levelname, bool(record.exc_info)) == ("ERROR", True)


def test_the_log_line_has_the_stages(worker, caplog):
    caplog.set_level("INFO")
    worker.run({"id": "logged", "input": WITH_LORA})
    (line,) = [record.message for record in caplog.records if record.message.startswith("{")]
    facts = json.loads(line)
    assert facts["job"] == "logged"
    assert facts["outcome"] == "ok"
    assert facts["loras"] == ["tiny-example"]
    assert facts["cache_hits"] == 1
    before = ("validating", "downloading", "loading_loras", "queued", "applying_loras")
    stages = (*before, "denoising", "restoring", "encoding", "last_update")
    assert set(facts["ms"]) == {*stages, "total"}
    assert sum(facts["ms"][stage] for stage in stages) <= facts["ms"]["total"] + 1


def test_the_pictures_text_names_the_model_by_its_hash(tmp_path):
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path))
    text = picture(worker.run(job())).info["parameters"]
    save_file(worker.pipeline.unet.state_dict(), tmp_path / "unet.safetensors")
    expected = hashlib.sha256((tmp_path / "unet.safetensors").read_bytes()).hexdigest()[:10]
    assert f"Model hash: {expected}, Model: tiny" in text


def test_progress_goes_to_runpod_in_production_only(worker):
    assert type(worker.start_run({"id": "a"}).progress).__name__ == "NoProgress"
    worker.mode = Mode.PRODUCTION
    assert type(worker.start_run({"id": "a"}).progress).__name__ == "RunPodProgress"
    worker.mode = Mode.LOCAL
    assert type(worker.start_run({"id": "a"}).progress).__name__ == "BarProgress"
    assert worker.answer_limit("a") is None


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shape"), MemoryError()])
def test_preload_logs_whatever_goes_wrong_and_the_worker_starts(pipeline, tmp_path, monkeypatch, caplog, error):
    settings = Settings(model_id="tiny", lora_cache_dir=tmp_path, lora_preload="not-there, first, tiny-example,,")
    worker = Worker(settings, Mode.PRODUCTION)
    worker.resident.use(pipeline)
    (tmp_path / "first.safetensors").write_bytes(write_example_lora(tmp_path).read_bytes())
    read, seen = LoraEngine.read, []

    def broken(engine: LoraEngine, path: Path) -> Any:
        seen.append(path.name)
        if path.name == "first.safetensors":
            raise error
        return read(engine, path)

    monkeypatch.setattr(LoraEngine, "read", broken)
    worker.get_ready()
    assert seen == ["first.safetensors", EXAMPLE_LORA]
    failed = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "LORA_NOT_FOUND: " in failed[0]
    assert "LORA_PRELOAD: first" in failed[1]
    assert len(failed) == 2


def test_a_model_that_is_not_there(tmp_path, caplog):
    settings = Settings(model_id="/nowhere", lora_cache_dir=tmp_path / "loras")
    for mode in (Mode.LOCAL, Mode.API):
        with pytest.raises(ModelUnavailable, match="MODEL_ID"):
            Worker(settings, mode).get_ready()
    # On RunPod the fitness checks tell the platform; the log has one line about it.
    Worker(settings, Mode.PRODUCTION).get_ready()
    assert (tmp_path / "loras").is_dir()
    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert (record.exc_info, record.message.count("\n")) == (None, 0)
    assert Worker(settings).run(job())["error"].startswith("MODEL_UNAVAILABLE: ")


def test_workers_side_by_side_share_nothing(tmp_path, monkeypatch):
    one, other = (Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / name)) for name in ("one", "other"))
    plain = {worker: worker.run(job()) for worker in (one, other)}
    (tmp_path / "other" / EXAMPLE_LORA).unlink()
    assert "loras" in one.run({"input": WITH_LORA})
    assert other.run({"input": WITH_LORA})["error"].startswith("LORA_NOT_FOUND: ")
    failing_at_step(one, monkeypatch, 1, RuntimeError("CUDA error: 700"))
    assert one.run(job())["refresh_worker"] is True
    assert other.run(job()) == plain[other]


def test_close_lets_go_of_the_pipeline_and_its_engine(tmp_path):
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path))
    assert "loras" in worker.run({"input": WITH_LORA})
    held = weakref.ref(worker.pipeline)
    worker.close()
    assert held() is None


@pytest.mark.parametrize("job_id", [None, 3, "", [], {"a": "b"}, "x" * 100_000, "deep"])
def test_an_odd_job_id_does_no_harm(worker, job_id):
    if job_id == "deep":
        job_id = []
        for _ in range(20_000):
            job_id = [job_id]
    assert "images" in worker.run({"id": job_id, "input": SMALL})


def test_the_worker_says_how_prompts_are_read_where_the_request_does_not(worker, tmp_path):
    plain, a1111 = ({"prompt": "a (cat:1.5)", "prompt_syntax": syntax} for syntax in ("plain", "a1111"))
    unsaid = {"prompt": "a (cat:1.5)"}
    assert worker.run(job(**unsaid))["warnings"] == worker.run(job(**plain))["warnings"]
    assert "warnings" not in worker.run(job(**a1111))
    other = Worker(Settings(model_id="tiny", prompt_syntax="a1111", lora_cache_dir=tmp_path / "loras"))
    other.resident.use(worker.pipeline)
    answers = [other.run(job(**fields)) for fields in (unsaid, {**unsaid, "prompt_syntax": None}, plain)]
    assert ["warnings" in answer for answer in answers] == [False, False, True]
    assert answers[0]["images"] == worker.run(job(**a1111))["images"]


def test_an_inspected_prompt_is_not_drawn(worker):
    answer = worker.run(job(prompt="a (cat:1.5) <lyco:x:1>", prompt_syntax="a1111", inspect_prompt=True, loras=["no"]))
    assert set(answer) == {"inspection", "table", "warnings"}
    assert answer["inspection"]["prompt"][0]["text_encoder"][1] == ["c", 1.5]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("(" * 100_000, "prompt must have at most 10000 characters"),
        ("[(" * 5_000, None),
        ("(" * 5_000 + ")" * 5_000, None),
        ("(" * 9_000 + "a", "prompt holds a weight that is too large"),
        ("(a:" + "9" * 9_000 + ")", "prompt holds a weight that is too large"),
        ("x " * 2_000, "prompt takes 27 chunks"),
        (" BREAK" * 1_600, "prompt takes 1600 chunks"),
    ],
)
def test_hostile_prompts_are_drawn_or_refused(worker, prompt: str, problem: str | None):
    before = worker.run(job())["images"]
    answer = worker.run(job(prompt=prompt, prompt_syntax="a1111"))
    assert answer.get("error", "").startswith(f"INVALID_INPUT: {problem}" if problem else "")
    assert ("images" in answer) == (problem is None)
    assert worker.run(job())["images"] == before
