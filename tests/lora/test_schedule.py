"""LoRAs that act on a part of the steps, against diffusers with weights that the test swaps between the steps."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_worker import job_run
from sdxl_worker.generate import batches
from sdxl_worker.generate import render as render_module
from sdxl_worker.generate.render import render
from sdxl_worker.job_run import Denoising, NoProgress, ProgressEvent
from sdxl_worker.lora import merge
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.ready import make_ready
from sdxl_worker.lora.schedule import LoraSchedule
from sdxl_worker.request import LoraScale, LoraSpan
from sdxl_worker.request.validation import validate_request
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.lora_files import Tensors, kohya, lora, save, weight_hash, whole_unet
from tests.support.pictures import by_diffusers, farthest, image_to_image, same

EULER_A = "EulerAncestralDiscreteScheduler"
STEPS = 5
FIELDS: dict[str, Any] = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": STEPS, "seed": 11}
BARE: dict[str, Any] = {key: value for key, value in FIELDS.items() if key != "seed"} | {"guidance_scale": 5.5}
TWO = ({"path": "a", "scale": 0.8, "end": 0.6}, {"path": "b", "scale": 0.5, "start": 0.6})
# Weights with what is added to each.
Part = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def parts(pipeline, tmp_path: Path) -> dict[str, Part]:
    """Three files in the cache folder, and by name the weights that each changes with their change at scale 1.

    `a` and `b` share weights, and `b` has some of its own; `words` changes the first text encoder and the UNet.
    """
    unet, encoder = pipeline.unet, pipeline.text_encoder
    tensors: dict[str, Tensors] = {"words": {}}
    found: dict[str, Part] = {"words": []}
    for name, kinds in {"a": ["LoRA"], "b": ["LoKr", "LoCon"]}.items():
        files, changes = zip(*[whole_unet(unet, kind) for kind in kinds], strict=True)
        tensors[name] = {key: tensor for file in files for key, tensor in file.items()}
        found[name] = [(unet.get_parameter(f"{at}.weight"), change) for each in changes for at, change in each.items()]
    for module in [name for name, _ in encoder.named_modules() if name.endswith(("q_proj", "v_proj", "fc1"))]:
        weight = encoder.get_parameter(f"{module}.weight")
        part, change = lora(weight)
        tensors["words"] |= kohya(f"text_model.{module.removeprefix('text_model.')}", part, "lora_te1_")
        found["words"].append((weight, change))
    tensors["words"] |= tensors["a"]
    for name, content in tensors.items():
        save(tmp_path / "loras" / f"{name}.safetensors", content)
    return found


@pytest.fixture
def worker(pipeline, engine: LoraEngine, tmp_path: Path, monkeypatch) -> Worker:
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    worker.resident.use(pipeline)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    return worker


def drawn(
    worker: Worker, *loras: Any, inputs: Any = None, on_step: Any = None, **fields: Any
) -> tuple[list[Image.Image], list]:
    """The pictures of a request with these LoRAs, and what each LoRA did."""
    request = validate_request({**FIELDS, **fields, "loras": list(loras)})
    assert request.warnings == ()
    run = worker.start_run({})
    engine = worker.engine_of(worker.pipeline)
    schedule = LoraSchedule(engine, make_ready(request.loras, worker.assets, lambda: engine, run), run)
    with schedule.merged():
        pictures = render(
            worker.pipeline, request, inputs=inputs or {}, on_step=on_step, before_step=schedule.before_step
        )
    run.finish("ok")
    return pictures, schedule.applied


@contextlib.contextmanager
def hand_merged(*scaled: tuple[Part, float]) -> Iterator[Callable[..., None]]:
    """Inside, `put(True, False)` sets every weight to the original plus the first part's scaled changes."""
    weights = {id(weight): weight for part, _ in scaled for weight, _ in part}
    kept = {key: weight.clone() for key, weight in weights.items()}

    def put(*are_on: bool) -> None:
        sums = {key: value.double() for key, value in kept.items()}
        for (part, scale), is_on in zip(scaled, are_on, strict=True):
            for weight, change in part:
                sums[id(weight)] = sums[id(weight)] + is_on * scale * change
        for key, value in sums.items():
            weights[key].copy_(value)

    try:
        yield put
    finally:
        for key, value in kept.items():
            weights[key].copy_(value)


def swapped(
    view: Any, put: Callable[..., None], segments: Sequence[tuple[bool, ...]], scheduler: str = EULER_A, **call: Any
) -> Any:
    """diffusers' picture with the weights of `segments[i]` during UNet call i; those of the first encode the prompt."""
    put(*segments[0])

    def after(_view: Any, step: int, _time: Any, _tensors: Any) -> dict[str, Any]:
        if step + 1 < len(segments):
            put(*segments[step + 1])
        return {}

    (picture,) = by_diffusers(view, scheduler, callback_on_step_end=after, **call)
    return picture


def unet_weights(pipeline: Any) -> torch.Tensor:
    """All weights of the UNet as they are now."""
    return torch.cat([parameter.flatten() for parameter in pipeline.unet.parameters()]).clone()


@pytest.mark.parametrize(
    ("start", "end", "steps", "acting"),
    [
        (0.0, 0.6, 5, [0, 1, 2]),
        (0.6, 1.0, 5, [3, 4]),
        (0.0, 1.0, 4, [0, 1, 2, 3]),
        (0.2, 0.4, 20, [4, 5, 6, 7]),
        (0.5, 1.0, 3, [2]),
        (0.0, 0.5, 3, [0, 1]),
        (0.0, 0.01, 4, [0]),
        (0.3, 0.4, 4, []),
        (0.99, 1.0, 4, []),
        # As floating-point numbers come: 0.30000000000000004, and 2/3 with seven digits.
        (0.1 + 0.2, 1.0, 10, [3, 4, 5, 6, 7, 8, 9]),
        (0.0, 0.6666667, 3, [0, 1]),
    ],
)
def test_which_steps_a_span_covers(start: float, end: float, steps: int, acting: list[int]) -> None:
    assert [step for step in range(steps) if LoraSpan(start, end).covers(step / steps)] == acting


def test_two_segments_are_those_of_weights_swapped_by_hand(worker, parts):
    before = weight_hash(worker.pipeline)
    with hand_merged((parts["a"], 0.8), (parts["b"], 0.5)) as put:
        expected = swapped(worker.pipeline, put, [(True, False)] * 3 + [(False, True)] * 2, **BARE)
        whole = swapped(worker.pipeline, put, [(True, False)] * 5, **BARE)
    assert weight_hash(worker.pipeline) == before
    (picture,), applied = drawn(worker, *TWO)
    assert farthest(picture, expected) <= 1
    assert farthest(picture, whole) > 1
    assert [done.layers for done in applied] == [len(parts["a"]), len(parts["b"])]
    assert weight_hash(worker.pipeline) == before


def test_a_lora_for_all_steps_stays_beside_one_that_comes_and_goes(worker, parts):
    with hand_merged((parts["a"], 0.8), (parts["b"], 0.5)) as put:
        segments = [(True, False), (True, True), (True, True), (True, False), (True, False)]
        expected = swapped(worker.pipeline, put, segments, **BARE)
    (picture,), _ = drawn(worker, {"path": "a", "scale": 0.8}, {"path": "b", "scale": 0.5, "start": 0.2, "end": 0.6})
    assert farthest(picture, expected) <= 1


def test_the_weights_of_a_segment_have_the_bits_of_a_request_that_has_only_them(worker, engine, parts, monkeypatch):
    """Whatever was merged before: nothing is added to or taken from a merged weight."""
    loras = [(engine.read(worker.settings.lora_cache_dir / f"{name}.safetensors")) for name in ("a", "b")]
    alone = []
    for merged in ([0], [0, 1], [1], []):
        with engine.applied([(loras[index], LoraScale.uniform(0.7)) for index in merged]):
            alone.append(unet_weights(worker.pipeline))
    seen: list[torch.Tensor] = []
    forward = worker.pipeline.unet.forward

    def looked_at(*arguments: Any, **options: Any) -> Any:
        seen.append(unet_weights(worker.pipeline))
        return forward(*arguments, **options)

    monkeypatch.setattr(worker.pipeline.unet, "forward", looked_at)
    drawn(
        worker,
        {"path": "a", "scale": 0.7, "end": 0.5},
        {"path": "b", "scale": 0.7, "start": 0.25, "end": 0.75},
        num_inference_steps=4,
    )
    assert [torch.equal(*pair) for pair in zip(seen, alone, strict=True)] == [True] * 4


def test_the_prompt_is_encoded_with_the_loras_of_the_first_step(worker, parts):
    with hand_merged((parts["words"], 1.0), (parts["a"], 1.0)) as put:
        first = swapped(worker.pipeline, put, [(True, True)] * 3 + [(True, False)] * 2, **BARE)
        later = swapped(worker.pipeline, put, [(False, False)] * 3 + [(False, True)] * 2, **BARE)
    words: list[torch.Tensor] = []

    def remember(*_: Any) -> None:
        words.append(parts["words"][0][0].clone())

    (picture,), (done,) = drawn(worker, {"path": "words", "end": 0.6}, on_step=remember)
    assert farthest(picture, first) <= 1
    assert all(torch.equal(weight, words[0]) for weight in words), "merged anew for nothing"
    assert done.layers == len(parts["words"]) + len(parts["a"])
    (picture,), (done,) = drawn(worker, {"path": "words", "start": 0.6})
    assert farthest(picture, later) <= 1
    assert farthest(first, later) > 1
    assert done.layers == len(parts["a"])


def test_each_batch_begins_with_the_first_segment(worker, parts, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 64 * 64)
    loras = ({"path": "words", "end": 0.4}, {"path": "b", "start": 0.4})
    pictures, _ = drawn(worker, *loras, num_images=2)
    (alone,), _ = drawn(worker, *loras, seed=12)
    assert farthest(pictures[1], alone) <= 1


def test_a_batch_that_is_drawn_again_begins_with_the_first_segment(worker, parts, monkeypatch):
    (alone,), _ = drawn(worker, *TWO)
    calls, forward = iter(range(1, 99)), worker.pipeline.unet.forward

    def too_many(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
        return forward(*arguments, **options)

    monkeypatch.setattr(worker.pipeline.unet, "forward", too_many)
    pictures, _ = drawn(worker, *TWO, num_images=2)
    assert next(calls) == 4 + 2 * STEPS + 1
    assert farthest(pictures[0], alone) <= 1


def test_both_calls_of_a_step_have_the_same_weights(worker, parts):
    """Heun's five steps take nine calls of the UNet, the last step a single one."""
    with hand_merged((parts["a"], 0.8), (parts["b"], 0.5)) as put:
        segments = [(True, False)] * 6 + [(False, True)] * 3
        expected = swapped(worker.pipeline, put, segments, "HeunDiscreteScheduler", **BARE)
    first, second = {"path": "a", "scale": 0.8, "end": 0.5}, {"path": "b", "scale": 0.5, "start": 0.5}
    (picture,), _ = drawn(worker, first, second, scheduler="Heun")
    assert farthest(picture, expected) <= 1


def test_image_to_image_counts_the_steps_that_are_run(worker, parts):
    start = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    call: dict[str, Any] = {
        "prompt": "a lighthouse",
        "image": start,
        "num_inference_steps": 8,
        "strength": 0.5,
        "guidance_scale": 5.5,
    }
    with hand_merged((parts["a"], 0.8), (parts["b"], 0.5)) as put:
        segments = [(True, False)] * 2 + [(False, True)] * 2
        expected = swapped(image_to_image(worker.pipeline), put, segments, **call)
    (picture,), _ = drawn(
        worker,
        {"path": "a", "scale": 0.8, "end": 0.5},
        {"path": "b", "scale": 0.5, "start": 0.5},
        inputs={"image_url": start},
        image_url="https://example.com/start.png",
        strength=0.5,
        num_inference_steps=8,
    )
    assert farthest(picture, expected) <= 1


def answered(worker: Worker, stop_after: int = 99, *, loras: Sequence[Any] = TWO, **fields: Any) -> dict[str, Any]:
    """The answer to a job with these LoRAs that is cancelled when this step is done."""
    run = worker.start_run({"id": "job"})

    class Stop(NoProgress):
        def update(self, event: ProgressEvent) -> None:
            if isinstance(event, Denoising) and event.step == stop_after:
                run.cancel()

    run.progress = Stop()
    return worker.run({"input": {**FIELDS, "loras": list(loras), **fields}}, run)


def picture_of(answer: dict[str, Any]) -> Image.Image:
    """The answer's first picture."""
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2])))


def restored(worker: Worker, before: str, plain: dict[str, Any]) -> bool:
    """True when every weight has its bits, and a request without LoRAs its picture."""
    return weight_hash(worker.pipeline) == before and worker.run({"input": FIELDS})["images"] == plain["images"]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_cancel_in_either_segment_puts_every_bit_back(worker, parts, step):
    before, plain = weight_hash(worker.pipeline), worker.run({"input": FIELDS})
    assert answered(worker, step)["error"].startswith("CANCELLED: ")
    assert restored(worker, before, plain)


@pytest.mark.parametrize("call", [2, 5])
def test_a_failure_in_either_segment_puts_every_bit_back(worker, parts, call, monkeypatch):
    before, plain = weight_hash(worker.pipeline), worker.run({"input": FIELDS})
    calls, forward = iter(range(1, 99)), worker.pipeline.unet.forward

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise RuntimeError("a bug, say")
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(worker.pipeline.unet, "forward", broken)
        assert answered(worker)["error"].startswith("INTERNAL: ")
    assert restored(worker, before, plain)


def test_memory_that_runs_out_between_two_steps_is_the_loras_fault(worker, parts, monkeypatch):
    before, plain = weight_hash(worker.pipeline), worker.run({"input": FIELDS})
    merged, real = iter(range(999)), merge._merge_one
    # Half-way through the second segment.
    fails_at = len(parts["a"]) + len(parts["b"]) // 2

    def no_memory(*arguments: Any) -> None:
        if next(merged) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_merge_one", no_memory)
        answer = answered(worker)
        assert next(merged) == fails_at + 1
    sentence = "the LoRAs need more memory than this worker has; use fewer or smaller ones"
    assert answer == {"error": f"LORA_INCOMPATIBLE: {sentence}"}
    assert restored(worker, before, plain)


def test_a_weight_that_cannot_be_put_back_between_two_steps_asks_for_a_fresh_worker(worker, parts, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *_args, **_keywords: (_ for _ in ()).throw(RuntimeError("CUDA")))
        answer = answered(worker, loras=[{"path": "a", "end": 0.6}])
        assert answer == {
            "error": "RESTORE_FAILED: the base model could not be put back after a LoRA",
            "refresh_worker": True,
        }
        assert worker.run({"input": FIELDS})["error"].startswith("RESTORE_FAILED: ")
    engine.restore()


def test_the_answer_has_the_span_and_the_picture_s_text_a_plain_tag(worker, parts):
    first, second, whole = answered(worker, loras=[*TWO, {"path": "a", "scale": 0.1}])["loras"]
    assert [(entry["start"], entry["end"]) for entry in (first, second)] == [(0.0, 0.6), (0.6, 1.0)]
    assert not {"start", "end"} & set(whole)
    assert picture_of(answered(worker)).info["parameters"].startswith("a lighthouse <lora:a:0.8> <lora:b:0.5>\n")


def test_a_lora_that_had_no_effect_is_named(worker, parts):
    path = worker.settings.lora_cache_dir / "text.safetensors"
    words = load_file(worker.settings.lora_cache_dir / "words.safetensors")
    save(path, {key: tensor for key, tensor in words.items() if key.startswith("lora_te1_")})
    plain = worker.run({"input": FIELDS})
    answer = answered(worker, loras=[{"path": "a", "start": 0.85}, {"path": "text", "start": 0.2}])
    assert same(picture_of(answer), picture_of(plain))
    assert answer["warnings"] == [
        "loras[0]: no step lies between its start and its end, so it had no effect",
        "loras[1]: it changes text encoders only, and the prompts are encoded before its start, so it had no effect",
    ]
    assert [entry["layers_applied"] for entry in answer["loras"]] == [0, 0]


def test_merging_between_steps_is_merging_in_the_job_s_line(worker, parts, caplog, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(job_run, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 1000))
    caplog.set_level("INFO")
    loras = [{"path": "a", "end": 0.2}, {"path": "b", "start": 0.4, "end": 0.6}]
    assert "images" in answered(worker, loras=loras)
    (line,) = [record.message for record in caplog.records if record.message.startswith("{")]
    milliseconds = json.loads(line)["ms"]
    # The clock ticks a millisecond whenever it is looked at: between two looks that are neighbours lies one.
    assert milliseconds["applying_loras"] == 1 + 3
    assert milliseconds["denoising"] == 7 - 3


def test_nothing_is_asked_between_steps_where_all_loras_act_at_all(worker, parts, monkeypatch):
    asked: list[Any] = []

    def draw(pipeline: Any, request: Any, **options: Any) -> list[Image.Image]:
        asked.append(options.pop("before_step"))
        return render(pipeline, request, **options)

    monkeypatch.setattr(render_module, "render", draw)
    for loras in ([], ["a"], [{"path": "a", "start": 0, "end": 1}], [{"path": "a", "end": 0.5}]):
        assert "images" in answered(worker, loras=loras)
    assert [before_step is None for before_step in asked] == [True, True, True, False]


def test_no_weight_is_copied_for_good_after_the_first_step(pipeline, parts, tmp_path):
    """A copy that is made late could be the one that there is no memory for."""
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    worker.resident.use(pipeline)
    engine = worker.engine_of(pipeline)
    kept: list[int] = []
    drawn(worker, *TWO, on_step=lambda *_: kept.append(len(engine._merger._pristine)))
    assert kept == [len({id(weight) for name in ("a", "b") for weight, _ in parts[name]})] * STEPS
