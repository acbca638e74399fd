"""COMPILE=1: nothing is compiled anew for LoRAs, sizes and prompts; pictures and weights are the plain worker's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from sdxl_worker import topology
from sdxl_worker.generate import compiled
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.lora_files import FORMATS, save, weight_hash, whole_unet
from tests.support.readme import ROOT

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SIZES = ((64, 64), (128, 64), (64, 128))
LONG = "a lighthouse at dusk, " * 40


@pytest.fixture(autouse=True)
def _dynamo_forgets() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(device: str):
    pipeline = topology.build_sdxl(device=device)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("device", DEVICES)
def test_switches_sizes_and_prompts_compile_nothing_anew(device: str, tmp_path: Path):
    """Twenty LoRA switches of all formats through the worker; dynamo alone, whose guards are what may fail."""
    pipeline = tiny(device)
    names = list(FORMATS)
    for name in names:
        save(tmp_path / f"{name}.safetensors", whole_unet(pipeline.unet, name)[0])
    keys = list(pipeline.unet.state_dict())
    compiled.compile_in_place(pipeline, "eager")
    assert list(pipeline.unet.state_dict()) == keys
    before = weight_hash(pipeline)
    random_state = torch.random.get_rng_state()
    compiled.warm_up(pipeline)
    assert graphs() > 0
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert weight_hash(pipeline) == before
    warm = graphs()
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path))
    worker.resident.use(pipeline)
    for number in range(20):
        width, height = SIZES[number % 3]
        fields = {
            "prompt": LONG if number % 2 else "a lighthouse",
            "prompt_syntax": "a1111",
            "width": width,
            "height": height,
            "num_inference_steps": 1,
            "num_images": 1 + number // 2 % 2,
            "guidance_scale": 1.0 if number // 4 % 2 else 5.5,
            "seed": number,
            "loras": [{"path": f"{names[number % len(names)]}.safetensors", "scale": 0.01 * (number + 1)}],
        }
        answer = worker.run({"input": fields})
        assert "images" in answer, answer
        assert graphs() == warm, fields
    assert compiled.is_compiled(pipeline)
    assert weight_hash(pipeline) == before


def test_what_cannot_be_compiled_is_drawn_as_written(caplog: pytest.LogCaptureFixture):
    """A compiler that fails costs no job: the log says it once, and the picture is the plain one."""
    request = GenerationRequest(prompt="a", width=64, height=64, num_inference_steps=1, scheduler="K_EULER", seed=3)
    pipeline = tiny("cpu")
    (plain,) = render(pipeline, request)

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    compiled.compile_in_place(pipeline, broken)
    (drawn,) = render(pipeline, request)
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(drawn)).max() <= 1
    assert not compiled.is_compiled(pipeline)
    said = [record.message for record in caplog.records if "cannot be compiled here" in record.message]
    assert len(said) == 1
    assert "no compiler here" in said[0]


INDUCTOR = """
import sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from sdxl_worker import prompts
from sdxl_worker.generate import compiled
from sdxl_worker.generate.render import render
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.request import GenerationRequest, LoraScale
from tests.generate.test_compiled import tiny
from tests.support.lora_files import save, weight_hash, whole_unet

device, folder = sys.argv[1], Path(sys.argv[2])
request = GenerationRequest(prompt="a", width=96, height=64, num_inference_steps=2, num_images=2, scheduler="K_EULER",
                            seed=3)
file = save(folder / "a.safetensors", whole_unet(tiny(device).unet, "LoRA")[0])

def pictures(pipeline):
    engine = LoraEngine(pipeline, 2**30)
    before, parsed = weight_hash(pipeline), engine.read(file)
    plain = np.asarray(render(pipeline, request)[0]).astype(int)
    engine.apply([(parsed, LoraScale.uniform(0.05))])
    merged = np.asarray(render(pipeline, request)[0]).astype(int)
    engine.restore()
    assert weight_hash(pipeline) == before
    return plain, merged

eager = pictures(tiny(device))
pipeline = tiny(device)
compiled.compile_in_place(pipeline)
drawn = pictures(pipeline)
assert compiled.is_compiled(pipeline)
assert (eager[0] != eager[1]).any()
print("worst", max(np.abs(one - other).max() for one, other in zip(eager, drawn)))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_of_compiled_code_are_the_plain_ones(device: str, tmp_path: Path):
    """With inductor itself, with and without a LoRA, to 1 of 255."""
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR, device, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("worst ")[1]) <= 1
