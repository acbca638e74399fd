"""handler.py as a person runs it: --help, one job, and the SDK's HTTP API against plain diffusers."""

from __future__ import annotations

import base64
import copy
import io
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from sdxl_worker import tiny
from tests.integration.conftest import SMALL
from tests.integration.worker_process import ROOT, WorkerProcess, worker_environment
from tests.support.http_server import FileServer, whole
from tests.support.lora_files import randn, save

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
CONVOLUTION = "down_blocks.0.resnets.0.conv1"

# (component, module) -> (down, up, alpha)
Parts = dict[tuple[str, str], tuple[Tensor, Tensor, float]]
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def parts_for(
    pipeline, seed: int, *, convolution: bool, alpha: float | None, parts_of: Sequence[str] = COMPONENTS
) -> Parts:
    """Random LoRA weights of rank 4 for the query projections of each part of the model, strong enough to be seen."""
    targets = [
        (component, name)
        for component in parts_of
        for name, _ in getattr(pipeline, component).named_modules()
        if name.endswith(("to_q", "to_v", "q_proj"))
    ]
    targets += [("unet", CONVOLUTION)] if convolution else []
    parts: Parts = {}
    for number, (component, name) in enumerate(targets):
        weight = weight_of(pipeline, component, name)
        down = 2 * randn(4, *weight.shape[1:], seed=seed + number)
        up = 2 * randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), seed=seed + number + 50)
        parts[component, name] = (down, up, 4.0 if alpha is None else alpha)
    return parts


def weight_of(pipeline, component: str, name: str) -> Tensor:
    return getattr(pipeline, component).get_parameter(f"{name}.weight")


def public_name(component: str, module: str) -> str:
    """The name in LoRA files: text encoders are known by the names of older transformers releases."""
    return module if component == "unet" else f"text_model.{module.removeprefix('text_model.')}"


def kohya(parts: Parts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (component, module), (down, up, alpha) in parts.items():
        key = KOHYA_PREFIX[component] + public_name(component, module).replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def kohya_own_blocks(parts: Parts) -> dict[str, Tensor]:
    """The block names of SDXL's original code, which number resnets and attentions of a level together."""
    renamed = {
        "mid_block_attentions_0": "middle_block_1",
        "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
    }
    for level, layer in ((1, 0), (1, 1), (2, 0), (2, 1)):
        renamed[f"down_blocks_{level}_attentions_{layer}"] = f"input_blocks_{3 * level + layer + 1}_1"
    for level, layer in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        renamed[f"up_blocks_{level}_attentions_{layer}"] = f"output_blocks_{3 * level + layer}_1"
    tensors: dict[str, Tensor] = {}
    for name, tensor in kohya(parts).items():
        for old, new in renamed.items():
            name = name.replace(f"lora_unet_{old}", f"lora_unet_{new}")
        tensors[name] = tensor
    return tensors


def diffusers_style(parts: Parts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (component, module), (down, up, _) in parts.items():
        key = f"{component}.{public_name(component, module)}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return tensors


def peft_style(parts: Parts) -> dict[str, Tensor]:
    return {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in diffusers_style(parts).items()}


# Key style -> (writer, whether its LoRA has a convolution, its alpha; None = the format has none)
STYLES: dict[str, tuple[Callable[[Parts], dict[str, Tensor]], bool, float | None]] = {
    "kohya": (kohya, True, 2.0),
    "kohya-own-blocks": (kohya_own_blocks, True, 1.0),
    "diffusers": (diffusers_style, False, None),
    "peft": (peft_style, False, None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusionXLPipeline, Path]:
    """A model of the test's own, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("model")
    tiny.build_sdxl(seed=11).save_pretrained(folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


@pytest.fixture(scope="module")
def api(base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Posts an input to /runsync of a worker that serves the model."""
    folder = tmp_path_factory.mktemp("api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = worker_environment(folder / "loras", MODEL_ID=str(base[1]))
    arguments = ("--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1")
    with WorkerProcess(folder / "log", environment, *arguments) as worker:
        worker.wait_for("Uvicorn running")

        def run(job_input: dict[str, Any]) -> dict[str, Any]:
            answer = requests.post(f"http://127.0.0.1:{port}/runsync", json={"input": job_input}, timeout=60)
            answer.raise_for_status()
            return answer.json()

        yield run


def pixels(answer: dict[str, Any]) -> np.ndarray:
    data = answer["output"]["images"][0].partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def plain_diffusers(pipeline) -> np.ndarray:
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    image = pipeline(
        SMALL["prompt"],
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=5.5,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    return np.asarray(image).astype(int)


@torch.no_grad()
def merged_by_hand(pipeline, loras: list[tuple[Parts, float]]):
    """A copy whose weights are W + scale * (alpha / rank) * up @ down, summed over the LoRAs (Hu et al. 2021)."""
    merged = copy.deepcopy(pipeline)
    for parts, scale in loras:
        for (component, module), (down, up, alpha) in parts.items():
            weight = weight_of(merged, component, module)
            product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
            weight += (scale * alpha / down.shape[0] * product).to(weight.dtype)
    return merged


def test_without_loras_every_bit_is_that_of_plain_diffusers(api, base):
    assert (pixels(api(SMALL)) == plain_diffusers(base[0])).all()


@pytest.mark.parametrize(
    ("style", "suffix"), [*((style, ".safetensors") for style in STYLES), ("kohya", ".pt"), ("kohya", ".bin")]
)
def test_a_lora_gives_the_picture_of_hand_merged_weights(style, suffix, api, base, files: FileServer, tmp_path):
    pipeline, _ = base
    writer, convolution, alpha = STYLES[style]
    parts_of = ("unet",) if style == "peft" else COMPONENTS
    parts = parts_for(pipeline, 100, convolution=convolution, alpha=alpha, parts_of=parts_of)
    path = tmp_path / f"lora{suffix}"
    if suffix == ".safetensors":
        save(path, writer(parts))
    else:
        torch.save(writer(parts), path)
    url = files.add(f"/{style}{suffix}", whole(path.read_bytes()))
    answer = api({**SMALL, "loras": [{"path": url, "scale": 0.8}]})
    assert "output" in answer, answer
    np.testing.assert_allclose(pixels(answer), plain_diffusers(merged_by_hand(pipeline, [(parts, 0.8)])), atol=1)
    assert np.abs(pixels(answer) - plain_diffusers(pipeline)).max() > 8
    assert answer["output"]["loras"][0]["layers_applied"] == len(parts)


def test_two_loras_with_different_scales(api, base, files: FileServer, tmp_path):
    pipeline, _ = base
    first = parts_for(pipeline, 200, convolution=True, alpha=2.0)
    second = parts_for(pipeline, 300, convolution=False, alpha=None)
    urls = [
        files.add("/first.safetensors", whole(save(tmp_path / "1", kohya(first)).read_bytes())),
        files.add("/second.safetensors", whole(save(tmp_path / "2", diffusers_style(second)).read_bytes())),
    ]
    answer = api({**SMALL, "loras": [{"path": urls[0], "scale": 0.6}, {"path": urls[1], "scale": -0.4}]})
    expected = plain_diffusers(merged_by_hand(pipeline, [(first, 0.6), (second, -0.4)]))
    np.testing.assert_allclose(pixels(answer), expected, atol=1)
    assert (pixels(api(SMALL)) == plain_diffusers(pipeline)).all()


def test_image_to_image_through_the_api(api, files: FileServer):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(buffer, "PNG")
    url = files.add("/start.png", whole(buffer.getvalue()))
    job = {**SMALL, "num_inference_steps": 4, "image_url": url}
    little, much = (pixels(api({**job, "strength": strength})) for strength in (0.25, 1.0))
    assert little.shape == (64, 64, 3)
    assert (little != much).any()
    assert api({**job, "image_url": f"{files.origin}/none.png"})["error"].startswith("INVALID_INPUT: image_url")


def test_errors_are_a_failed_status_with_a_code(api):
    answer = api({"width": 1001})
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("INVALID_INPUT: prompt is required; width must")


def test_the_job_in_test_input_json_saves_its_picture_says_where_and_shows_a_bar(tmp_path):
    job = {"input": {**SMALL, "loras": [{"path": "tiny-example", "scale": 0.8}]}}
    (tmp_path / "test_input.json").write_text(json.dumps(job))
    environment = worker_environment(tmp_path / "loras")
    done = subprocess.run(
        [sys.executable, str(ROOT / "handler.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("Saved output/local_test_1.png")
    saved = Image.open(tmp_path / "output" / "local_test_1.png")
    assert saved.size == (64, 64)
    assert "<lora:tiny-example:0.8>" in saved.info["parameters"]
    assert "2/2" in done.stderr
    assert "worker: python 3." in done.stdout
