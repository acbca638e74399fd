"""COMPILE=1: nothing is compiled anew for LoRAs, sizes and prompts; pictures and weights are the plain worker's."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from sdxl_worker import topology
from sdxl_worker.generate import compiled
from sdxl_worker.generate.render import render
from sdxl_worker.memory import is_out_of_memory
from sdxl_worker.request import GenerationRequest
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.lora_files import FORMATS, save, weight_hash, whole_unet
from tests.support.readme import ROOT

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
REQUEST = GenerationRequest(prompt="a", width=64, height=64, num_inference_steps=1, scheduler="K_EULER", seed=3)
SIZES = ((64, 64), (128, 64), (64, 128))
# By how many chunks of 75 tokens the tiny model's tokenizers make of them.
PROMPTS = {1: "a lighthouse", 3: "a lighthouse at dusk, " * 16, 7: "a lighthouse at dusk, " * 40}


@pytest.fixture(autouse=True)
def _dynamo_forgets() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(device: str, dtype: torch.dtype = torch.float32):
    pipeline = topology.build_sdxl(device=device, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("device", DEVICES)
def test_switches_sizes_and_prompts_compile_nothing_anew(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twenty LoRA switches of all formats through the worker, with all blocks that a GPU has compiled.

    Dynamo alone, whose guards are what may fail, and without MKLDNN, whose convolutions want code of their own for
    small pictures.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    pipeline = tiny(device, torch.float16 if device == "cuda" else torch.float32)
    names = list(FORMATS)
    for name in names:
        save(tmp_path / f"{name}.safetensors", whole_unet(pipeline.unet, name)[0])
    keys = list(pipeline.unet.state_dict())
    compiled.compile_in_place(pipeline, "eager", gpu=True)
    assert list(pipeline.unet.state_dict()) == keys
    before = weight_hash(pipeline)
    random_state = torch.random.get_rng_state()
    compiled.warm_up(pipeline)
    # Of transformer blocks one for each number of rows, since the tiny model has them in one width.
    assert len(_debug_get_cache_entry_list(BasicTransformerBlock.forward)) == 2
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert weight_hash(pipeline) == before
    warm = graphs()
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path))
    worker.resident.use(pipeline)
    for chunks, prompt in PROMPTS.items():
        read = worker.run({"input": {"prompt": prompt, "prompt_syntax": "a1111", "inspect_prompt": True}})
        assert len(read["inspection"]["prompt"]) == chunks
    prompts = list(PROMPTS.values())
    # In a thread of its own, as the SDK's loop has it: some of torch's settings are each thread's own.
    jobs = ThreadPoolExecutor(1)
    for number in range(20):
        width, height = SIZES[number % 3]
        fields = {
            "prompt": prompts[number // 3 % 3],
            "prompt_syntax": "a1111",
            "width": width,
            "height": height,
            "num_inference_steps": 1,
            "num_images": 1 + number // 2 % 2,
            "guidance_scale": 1.0 if number // 4 % 2 else 5.5,
            "seed": number,
            "loras": [{"path": f"{names[number % len(names)]}.safetensors", "scale": 0.01 * (number + 1)}],
        }
        answer = jobs.submit(worker.run, {"input": fields}).result()
        assert "images" in answer, answer
        assert graphs() == warm, fields
    worker.run({"input": {**fields, "num_inference_steps": 4, "guidance_scale": 5.5, "cfg_end": 0.5, "deep_cache": 2}})
    assert graphs() == warm
    assert compiled.is_compiled(pipeline)
    assert weight_hash(pipeline) == before


def test_what_cannot_be_compiled_is_drawn_as_written(caplog: pytest.LogCaptureFixture):
    """A compiler that fails costs no job: the log says it once, and the picture is the plain one. What fails for one
    class of blocks leaves the others compiled."""
    pipeline = tiny("cpu")
    plain = np.asarray(render(pipeline, REQUEST)[0]).astype(int)

    def no_convolutions(graph: torch.fx.GraphModule, _inputs: object) -> object:
        if any(node.target is torch.conv2d for node in graph.graph.nodes):
            raise RuntimeError("no convolutions here")
        if broken:
            raise RuntimeError("no compiler here")
        return graph.forward

    def compiled_classes() -> set[str]:
        modules = [*pipeline.unet.modules(), *pipeline.vae.modules()]
        return {type(module).__name__ for module in modules if module._compiled_call_impl}

    broken = False
    compiled.compile_in_place(pipeline, no_convolutions, gpu=True)
    assert compiled_classes() == {"BasicTransformerBlock", "ResnetBlock2D", "UpDecoderBlock2D"}
    assert np.abs(plain - np.asarray(render(pipeline, REQUEST)[0])).max() <= 1
    assert compiled_classes() == {"BasicTransformerBlock"}
    assert "the model's ResnetBlock2D cannot be compiled here (RuntimeError: no convolutions here)" in caplog.text
    caplog.clear()
    torch._dynamo.reset()
    broken = True
    assert np.abs(plain - np.asarray(render(pipeline, REQUEST)[0])).max() <= 1
    assert not compiled.is_compiled(pipeline)
    said = [record.message for record in caplog.records if "cannot be compiled here" in record.message]
    assert len(said) == 1
    assert "no compiler here" in said[0]


def test_a_folder_that_takes_nothing_gives_way_to_a_local_one(caplog, monkeypatch, tmp_path: Path):
    """A full or read-only volume is met when the first code is written, which is tried once more elsewhere.

    What is kept bears the kernel of ATTENTION: torch's cache looks at the graph, in which it does not stand, and at the
    tag.
    """
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "/full")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders, tags = [], set()

    def writing(graph: torch.fx.GraphModule, _inputs: object) -> object:
        tags.add(torch.compiler.config.cache_key_tag)
        folders.append((os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"]))
        if folders[-1][0] == "/full":
            raise OSError(28, "No space left on device")
        return graph.forward

    pipeline = tiny("cpu")
    compiled.compile_in_place(pipeline, writing, kernel="math")
    render(pipeline, REQUEST)
    assert compiled.is_compiled(pipeline)
    assert tags == {"attention math"}
    assert torch.compiler.config.cache_key_tag == ""
    assert folders[0] == ("/full", "/full")
    assert {Path(folder).parent for pair in folders[1:] for folder in pair} == {tmp_path}
    assert len(set(folders[1:])) == 1
    assert "COMPILE_CACHE_DIR cannot be used (OSError: [Errno 28] No space left on device)" in caplog.text


def test_forms_beyond_the_limit_of_graphs_are_drawn_as_written(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One row for the UNet instead of two wants a graph of its own; the rest stays compiled.

    Here one is the worker's limit, and none torch's, in a thread that nobody has told otherwise.
    """
    monkeypatch.setattr(compiled, "_MOST_GRAPHS", 1)
    without_guidance = dataclasses.replace(REQUEST, guidance_scale=1.0)
    pipeline = tiny("cpu")
    (plain,) = render(pipeline, without_guidance)
    compiled.compile_in_place(pipeline, "eager")

    def draw() -> Image.Image:
        with torch._dynamo.config.patch(recompile_limit=0):
            render(pipeline, REQUEST)
            return render(pipeline, without_guidance)[0]

    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(draw).result()
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(drawn)).max() <= 1
    assert compiled.is_compiled(pipeline)
    assert graphs() == 1
    assert caplog.text.count("too many forms of BasicTransformerBlock") == 1


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_memory_that_runs_out_is_no_failure_of_the_compiler(when: str):
    """It is the job's to hear of, and what is compiled stays so."""
    pipeline = tiny("cpu")

    def run(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    compiled.compile_in_place(pipeline, run if when == "compiling" else lambda *_: run)
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        render(pipeline, REQUEST)
    assert is_out_of_memory(caught.value)
    assert compiled.is_compiled(pipeline)


INDUCTOR = """
import logging
import os
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

device, folder, runs = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
torch.backends.cudnn.allow_tf32 = False
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

path = os.environ["PATH"]
if "without a compiler" in runs:
    # Before the first LoRA is merged: what Triton builds for its kernel would be enough for the blocks as well.
    logging.basicConfig(stream=sys.stdout)
    os.environ |= {name: str(folder) for name in ("PATH", *compiled.CACHE_VARIABLES)}
    for name in ("CC", "CXX"):
        os.environ.pop(name, None)

eager = pictures(tiny(device))

def compare(is_compiled):
    pipeline = tiny(device)
    compiled.compile_in_place(pipeline)
    drawn = pictures(pipeline)
    assert compiled.is_compiled(pipeline) is is_compiled
    assert (eager[0] != eager[1]).any()
    print("worst", max(np.abs(one - other).max() for one, other in zip(eager, drawn)))

if "without a compiler" in runs:
    compare(False)
    for name in compiled.CACHE_VARIABLES:
        del os.environ[name]
    os.environ["PATH"] = path
if "with one" in runs:
    compare(True)
"""


def pictures_of(device: str, folder: Path, *runs: str) -> str:
    """What a fresh process says of pictures of compiled code against plain ones."""
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR, device, str(folder), *runs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_of_compiled_code_are_the_plain_ones(device: str, tmp_path: Path):
    """With inductor itself, with and without a LoRA, to 1 of 255; and on a machine that has no compiler.

    On the CPU both in one process, which takes half the time: torch keeps no compiler in mind that it did not find.
    """
    runs = ("without a compiler", "with one")
    said = (
        pictures_of(device, tmp_path, *runs)
        if device == "cpu"
        else "".join(pictures_of(device, tmp_path, run) for run in runs)
    )
    assert all(int(line.split()[1]) <= 1 for line in said.splitlines() if line.startswith("worst")), said
    assert said.count("worst") == 2
    assert said.count("cannot be compiled here") == 1
