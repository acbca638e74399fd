"""Few-step LoRAs through the worker, each as a stand-in with the real one's name and way of writing keys."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sdxl_worker.assets.sources import hub
from sdxl_worker.job_run import Denoising, JobRun, NoProgress, ProgressEvent
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request.validation import validate_request
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.http_server import FileServer, redirect, whole
from tests.support.hub_server import Hub, Repo
from tests.support.lora_files import weight_hash
from tests.support.lora_styles import merged_by_hand, styled_file


def data_uri(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PICTURE, MASK = data_uri("teal"), data_uri("white")
SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "seed": 5}
WEIGHTS = "pytorch_lora_weights.safetensors"
TRAILING = {"schedule_type": "sgm_uniform", "guidance_scale": 1.0}

# repo, file in it, way of writing keys, the settings that are used, what the picture's text says, and the timesteps
# that the UNet sees, for 4 and fewer steps worked out by hand: trailing is 1000 - i * 1000 / n - 1; of the 50 timesteps
# 19, 39, ..., 999 that LCM and TCD were distilled for, every 50 / n-th.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any], str, list[int]]] = {
    "LCM-LoRA": (
        "latent-consistency/lcm-lora-sdxl",
        WEIGHTS,
        "kohya, diffusers names",
        {"scheduler": "LCM", "schedule_type": "automatic", "num_inference_steps": 4, "guidance_scale": 1.0},
        "Steps: 4, Sampler: LCM, Schedule type: Automatic, CFG scale: 1,",
        [999, 759, 499, 259],
    ),
    **{
        f"SDXL-Lightning, {steps} steps": (
            "ByteDance/SDXL-Lightning",
            f"sdxl_lightning_{steps}step_lora.safetensors",
            "kohya, diffusers names",
            {"scheduler": "K_EULER", "num_inference_steps": steps, **TRAILING},
            f"Steps: {steps}, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 1,",
            timesteps,
        )
        for steps, timesteps in {
            2: [999, 499],
            4: [999, 749, 499, 249],
            8: [999, 874, 749, 624, 499, 374, 249, 124],
        }.items()
    },
    "SDXL-Turbo": (
        "shiroppo/sd_xl_turbo_lora",
        "sd_xl_turbo_lora_v1.safetensors",
        "kohya, SDXL names",
        {"scheduler": "K_EULER_ANCESTRAL", "num_inference_steps": 4, **TRAILING},
        "Steps: 4, Sampler: Euler a, Schedule type: SGM Uniform, CFG scale: 1,",
        [999, 749, 499, 249],
    ),
    "Hyper-SD, 1 step": (
        "ByteDance/Hyper-SD",
        "Hyper-SDXL-1step-lora.safetensors",
        "kohya, diffusers names",
        {"scheduler": "TCD", "schedule_type": "automatic", "num_inference_steps": 1, "eta": 1.0, "guidance_scale": 1.0},
        "Steps: 1, Sampler: TCD, Schedule type: Automatic,",
        [999],
    ),
    **{
        f"Hyper-SD, {steps} steps": (
            "ByteDance/Hyper-SD",
            f"Hyper-SDXL-{steps}steps-lora.safetensors",
            "kohya, diffusers names",
            {"scheduler": "DDIM", "num_inference_steps": steps, **TRAILING},
            f"Steps: {steps}, Sampler: DDIM, Schedule type: SGM Uniform, CFG scale: 1,",
            timesteps,
        )
        for steps, timesteps in {
            2: [999, 499],
            4: [999, 749, 499, 249],
            8: [999, 874, 749, 624, 499, 374, 249, 124],
        }.items()
    },
    **{
        f"Hyper-SD CFG, {steps} steps": (
            "ByteDance/Hyper-SD",
            f"Hyper-SDXL-{steps}steps-CFG-lora.safetensors",
            "kohya, diffusers names",
            {"scheduler": "DDIM", "num_inference_steps": steps, **TRAILING, "guidance_scale": 5.5},
            f"Steps: {steps}, Sampler: DDIM, Schedule type: SGM Uniform, CFG scale: 5.5,",
            timesteps,
        )
        for steps, timesteps in {
            8: [999, 874, 749, 624, 499, 374, 249, 124],
            12: [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
        }.items()
    },
    "TCD-LoRA": (
        "h1t/TCD-SDXL-LoRA",
        WEIGHTS,
        "diffusers",
        {"scheduler": "TCD", "schedule_type": "automatic", "num_inference_steps": 4, "eta": 0.3, "guidance_scale": 1.0},
        "Steps: 4, Sampler: TCD, Schedule type: Automatic,",
        [999, 759, 499, 259],
    ),
    "DMD2": (
        "tianweiy/DMD2",
        "dmd2_sdxl_4step_lora.safetensors",
        "diffusers",
        {
            "scheduler": "LCM",
            "schedule_type": "automatic",
            "num_inference_steps": 4,
            "timesteps": [999, 749, 499, 249],
            "guidance_scale": 1.0,
        },
        "Steps: 4, Sampler: LCM, Schedule type: Automatic,",
        [999, 749, 499, 249],
    ),
}
LIGHTNING = "SDXL-Lightning, 4 steps"


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, and beside it on the same server whatever else there is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "RETRY_S", 0.001)
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    with FileServer() as server, FileServer() as cdn:
        yield Hub(server, cdn)


@pytest.fixture
def host() -> Iterator[FileServer]:
    """Somebody's own host."""
    with FileServer() as server:
        yield server


@pytest.fixture
def worker(pipeline, engine: LoraEngine, internet: Hub, tmp_path: Path, monkeypatch) -> Worker:
    """A worker with the session's pipeline and an empty cache, for which the stand-ins are the internet."""
    settings = Settings(
        model_id="tiny",
        lora_cache_dir=tmp_path / "loras",
        hf_endpoint=internet.endpoint,
        civitai_endpoint=internet.cdn.origin,
    )
    worker = Worker(settings)
    worker.resident.use(pipeline)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    return worker


@pytest.fixture
def seen(pipeline, monkeypatch) -> list[tuple[int, int, float]]:
    """What the UNet is called with, as it is called: batch size, timestep, and the sampler's first noise level."""
    calls: list[tuple[int, int, float]] = []
    forward = pipeline.unet.forward

    def watched(sample: torch.Tensor, timestep: Any, *arguments: Any, **options: Any) -> Any:
        sigmas = getattr(pipeline.scheduler, "sigmas", None)
        calls.append((sample.shape[0], int(timestep), 0.0 if sigmas is None else float(sigmas[0])))
        return forward(sample, timestep, *arguments, **options)

    monkeypatch.setattr(pipeline.unet, "forward", watched)
    return calls


def stand_in(pipeline, style: str, metadata: dict[str, str] | None = None) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in styled_file(pipeline, style)[0].items()}, metadata)


def put(worker: Worker, name: str, content: bytes) -> str:
    worker.settings.lora_cache_dir.mkdir(parents=True, exist_ok=True)
    (worker.settings.lora_cache_dir / name).write_bytes(content)
    return name


def drawn(worker: Worker, **fields: Any) -> dict[str, Any]:
    answer = worker.run({"id": "job", "input": {**SMALL, **fields}})
    assert "error" not in answer, answer
    return answer


def picture(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2])))


def used(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer["settings"].items() if name not in ("lora", "kind", "chosen")}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_drawn_with_its_settings(kind: str, worker: Worker, internet: Hub, seen) -> None:
    """Named by its repo; afterwards by its name in the cache, without the Hub."""
    repo, file, style, settings, text, timesteps = FAMILIES[kind]
    internet.add(repo, Repo({file: stand_in(worker.pipeline, style)}))
    before = weight_hash(worker.pipeline)
    answer = drawn(worker, loras=[repo if file == WEIGHTS else f"{repo}/{file}"])
    (lora,) = answer["loras"]
    assert (answer["settings"]["kind"], answer["settings"]["lora"]) == (kind, lora["name"])
    assert json.loads(json.dumps(used(answer))) == settings
    assert "warnings" not in answer
    assert text in picture(answer).info["parameters"]
    # One pass per step without guidance, one of two pictures with it.
    assert [(batch, timestep) for batch, timestep, _ in seen] == [
        (1 if settings["guidance_scale"] <= 1 else 2, timestep) for timestep in timesteps
    ]
    internet.down = True
    again = drawn(worker, loras=[lora["name"]])
    assert again["settings"] == answer["settings"]
    assert again["images"] == answer["images"]
    assert weight_hash(worker.pipeline) == before


def test_trailing_starts_at_all_the_noise_and_leading_does_not(worker: Worker, seen) -> None:
    """SDXL's noise levels, by its paper's formula: 14.6 at timestep 999 and 4.1 at 751."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    level = np.sqrt((1 - kept) / kept)
    assert (round(level[999], 1), round(level[751], 1)) == (14.6, 4.1)
    name = put(worker, "sdxl_lightning_4step_lora.safetensors", stand_in(worker.pipeline, FAMILIES[LIGHTNING][2]))
    chosen = drawn(worker, loras=[name])
    assert [sigma for _, _, sigma in seen] == pytest.approx([level[999]] * 4, rel=1e-4)
    seen.clear()
    leading = drawn(worker, loras=[name], scheduler="K_EULER", schedule_type="automatic")
    assert seen[0][1] == 751
    assert [sigma for _, _, sigma in seen] == pytest.approx([level[751]] * 4, rel=1e-4)
    assert "wants schedule_type sgm_uniform" in leading["warnings"][0]
    assert chosen["images"] != leading["images"]


def test_lightning_is_what_stock_diffusers_draws_by_its_readme(worker: Worker) -> None:
    tensors, changes = styled_file(worker.pipeline, "kohya, diffusers names")
    stock = merged_by_hand(worker.pipeline, [(changes, 1.0)])
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(5)
    expected = stock(
        "a lighthouse", width=64, height=64, num_inference_steps=4, guidance_scale=0, generator=generator
    ).images[0]
    name = put(worker, "sdxl_lightning_4step_lora.safetensors", save(tensors))
    answer = drawn(worker, loras=[name])
    np.testing.assert_allclose(np.asarray(picture(answer)).astype(int), np.asarray(expected).astype(int), atol=1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_says_what_it_wants_when_the_request_says_otherwise(kind: str, worker: Worker, seen) -> None:
    _, file, style, settings, _, _ = FAMILIES[kind]
    named = {WEIGHTS: {"LCM-LoRA": "lcm-lora-sdxl.safetensors", "TCD-LoRA": "TCD-SDXL-LoRA.safetensors"}.get(kind, "")}
    name = put(worker, named.get(file, file), stand_in(worker.pipeline, style))
    given = {"scheduler": "UniPC", "num_inference_steps": 60, "guidance_scale": 2.6}
    if settings["num_inference_steps"] == 1:
        given["num_inference_steps"] = 9
    answer = drawn(worker, loras=[name], **given, width=64)
    (warning,) = answer["warnings"]
    assert warning.startswith(f"loras[0]: it is {kind}, which wants scheduler {settings['scheduler']}")
    for field in given:
        assert f"{field} " in warning
        assert used(answer)[field] == given[field]
    assert len(seen) == given["num_inference_steps"]


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"ss_output_name": "sdxl_lightning_4step_lora"}, LIGHTNING),
        ({"modelspec.title": "SDXL Lightning 4-step LoRA"}, LIGHTNING),
        ({"modelspec.title": "fast", "ss_output_name": "lcm-lora-sdxl"}, "LCM-LoRA"),
        ({"ss_sd_model_name": "sdxl_lightning_4step.safetensors", "ss_output_name": "my style"}, None),
        ({"modelspec.title": "Lightning bolts for SDXL"}, None),
    ],
)
def test_metadata_says_it_where_no_name_does(metadata, kind, worker: Worker, internet: Hub) -> None:
    """As from Civitai, whose links have numbers for names."""
    content = stand_in(worker.pipeline, "kohya, SDXL names", metadata)
    file = internet.cdn.add("/b2/file", whole(content))
    internet.cdn.add("/api/download/models/7", redirect(file))
    answer = drawn(worker, loras=["civitai:5@7"], **({} if kind else {"num_inference_steps": 1}))
    assert answer.get("settings", {}).get("kind") == kind


def test_a_url_or_the_request_s_own_name_says_it(worker: Worker, host: FileServer) -> None:
    content = stand_in(worker.pipeline, "kohya, SDXL names")
    url = host.add("/files/dmd2_sdxl_4step_lora_fp16.safetensors", whole(content))
    assert drawn(worker, loras=[url])["settings"]["kind"] == "DMD2"
    plain = host.add("/files/1234", whole(content))
    assert "settings" not in drawn(worker, loras=[plain], num_inference_steps=1)
    named = drawn(worker, loras=[{"path": plain, "name": "sdxl_lightning_2step_lora"}])
    assert named["settings"]["kind"] == "SDXL-Lightning, 2 steps"
    assert drawn(worker, loras=["sdxl_lightning_2step_lora"])["settings"]["kind"] == "SDXL-Lightning, 2 steps"


def test_a_file_from_a_repo_is_known_by_the_repo_once_it_is_cached(worker: Worker, internet: Hub) -> None:
    """The file's own name says nothing: pytorch_lora_weights."""
    repo = FAMILIES["LCM-LoRA"][0]
    internet.add(repo, Repo({WEIGHTS: stand_in(worker.pipeline, "kohya, diffusers names")}))
    name = drawn(worker, loras=[f"{repo}/{WEIGHTS}"])["loras"][0]["name"]
    assert name.endswith("_pytorch_lora_weights.safetensors")
    assert drawn(worker, loras=[name])["settings"]["kind"] == "LCM-LoRA"


def test_a_tag_in_the_prompt_is_enough(worker: Worker) -> None:
    put(worker, "sdxl_lightning_2step_lora.safetensors", stand_in(worker.pipeline, "kohya, diffusers names"))
    answer = drawn(worker, prompt="a lighthouse <lora:sdxl_lightning_2step_lora:1>", prompt_syntax="a1111")
    assert used(answer)["num_inference_steps"] == 2


# The timesteps that the UNet sees: of the steps that are chosen, the last int(steps * strength), and with hires, those
# of its second pass, which makes as many as the first, from strength 0.4 (the last of ceil(steps / 0.4)).
MODES: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "image": (
        {"image": PICTURE, "strength": 0.5},
        {"SDXL-Lightning, 2 steps": [499], "DMD2": [499, 249], "Hyper-SD, 1 step": [499]},
    ),
    "inpaint": (
        {"image": PICTURE, "mask": MASK},
        {"SDXL-Lightning, 2 steps": [499], "DMD2": [749, 499, 249], "Hyper-SD, 1 step": [499]},
    ),
    "hires": (
        {"hires": {"scale": 2}},
        {
            "SDXL-Lightning, 2 steps": [999, 499, 399, 199],
            "DMD2": [999, 749, 499, 249, *[399, 299, 199, 99]],
            "Hyper-SD, 1 step": [999, 339],
        },
    ),
}


@pytest.mark.parametrize("kind", ["SDXL-Lightning, 2 steps", "DMD2", "Hyper-SD, 1 step"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_the_chosen_settings(mode: str, kind: str, worker: Worker, seen) -> None:
    name = put(worker, FAMILIES[kind][1], stand_in(worker.pipeline, FAMILIES[kind][2]))
    fields, timesteps = MODES[mode]
    answer = drawn(worker, loras=[name], **fields)
    assert answer["settings"]["kind"] == kind
    assert "warnings" not in answer
    assert [(batch, timestep) for batch, timestep, _ in seen] == [(1, timestep) for timestep in timesteps[kind]]


def test_progress_counts_the_chosen_steps(worker: Worker) -> None:
    name = put(worker, "sdxl_lightning_2step_lora.safetensors", stand_in(worker.pipeline, "kohya, diffusers names"))
    told: list[tuple[int, int]] = []

    class Listener(NoProgress):
        def update(self, event: ProgressEvent) -> None:
            told.extend([(event.step, event.steps)] if isinstance(event, Denoising) else ())

    run = JobRun("job", worker.turns.ticket(), Listener())
    assert "error" not in worker.run({"id": "job", "input": {**SMALL, "loras": [name]}}, run)
    assert told == [(1, 2), (2, 2)]


def test_scale_0_chooses_nothing(worker: Worker) -> None:
    name = put(worker, "sdxl_lightning_2step_lora.safetensors", stand_in(worker.pipeline, "kohya, diffusers names"))
    answer = drawn(worker, loras=[{"path": name, "scale": 0}])
    assert "settings" not in answer
    assert "Steps: 28, Sampler: Euler a," in picture(answer).info["parameters"]


def test_a_request_is_not_refused_for_the_steps_that_it_leaves_to_its_lora() -> None:
    fields = {**SMALL, "width": 2048, "height": 2048, "num_images": 4}
    assert validate_request({**fields, "loras": ["sdxl_lightning_4step_lora"]}).loras
    assert validate_request({**fields, "prompt": "a <lora:sdxl_lightning_4step_lora>", "prompt_syntax": "a1111"})


def test_a_request_that_stays_too_large_is_refused_before_it_is_drawn(worker: Worker, seen) -> None:
    name = put(worker, "style.safetensors", stand_in(worker.pipeline, "kohya, diffusers names"))
    fields = {**SMALL, "width": 2048, "height": 2048, "num_images": 4, "loras": [name]}
    answer = worker.run({"id": "job", "input": fields})
    assert answer["error"].startswith("INVALID_INPUT: width x height x calls")
    assert seen == []
