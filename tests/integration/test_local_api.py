"""The SDK's HTTP API on a model folder: pictures against plain diffusers on weights merged by hand."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from sdxl_worker import topology
from sdxl_worker.generate.samplers import make_scheduler
from tests.integration.worker_process import WorkerProcess, worker_environment
from tests.support.http_server import FileServer, whole
from tests.support.lora_files import kohya, lora, save, whole_unet
from tests.support.lora_styles import STYLES, layers_of, merged_by_hand, styled_file

# Bounds a hang.
PATIENCE = 300
INPUT = {
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "seed": 5,
}


@dataclass
class Api:
    """A worker's local API, the files it may download, and the model it serves."""

    url: str
    files: FileServer
    pipeline: Any
    folder: Path

    def run(self, **more: object) -> dict[str, Any]:
        """The answer of /runsync to INPUT with `more`."""
        return requests.post(f"{self.url}/runsync", json={"input": {**INPUT, **more}}, timeout=PATIENCE).json()

    def picture(self, **more: object) -> np.ndarray:
        """The first picture as int16."""
        answer = self.run(**more)
        assert answer["status"] == "COMPLETED", answer
        data = base64.b64decode(answer["output"]["images"][0].partition("base64,")[2])
        return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)

    def serve(self, name: str, content: bytes) -> str:
        """The URL of a file with this content."""
        self.files.add(f"/{name}", whole(content))
        return f"http://127.0.0.1:{self.files.server_address[1]}/{name}"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """python handler.py --rp_serve_api, on a model folder made here."""
    folder = tmp_path_factory.mktemp("api")
    pipeline = topology.build_sdxl(seed=42)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    environment = worker_environment(folder / "loras", MODEL_ID=str(folder / "model"))
    # Port 0: the system chooses one that is free, and the server says which.
    arguments = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", "0")
    with FileServer() as files, WorkerProcess(folder / "worker.log", environment, *arguments) as worker:
        worker.wait_for("(Press CTRL+C to quit)")
        found = re.search(r"running on (http://127\.0\.0\.1:\d+) ", worker.text)
        assert found, worker.text
        yield Api(found[1], files, pipeline, folder)


def _plain(pipeline) -> np.ndarray:
    """What diffusers alone renders for INPUT with the worker's default scheduler and guidance scale."""
    resident = pipeline.scheduler
    pipeline.scheduler = make_scheduler("K_EULER_ANCESTRAL", resident.config)
    image = pipeline(
        **{**INPUT, "seed": None, "generator": torch.Generator().manual_seed(5)} | {"guidance_scale": 5.5}
    ).images
    pipeline.scheduler = resident
    return np.asarray(image[0]).astype(np.int16)


def _content(folder: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    return save(folder / "made.safetensors", tensors).read_bytes()


def test_without_loras_the_picture_is_that_of_plain_diffusers(api: Api):
    # Two loads of the same weights: 1 of 255 (tests/test_worker.py has the bits, on one load).
    assert np.abs(api.picture() - _plain(api.pipeline)).max() <= 1
    log = (api.folder / "worker.log").read_text()
    assert "Loading" not in log
    assert "HTTP Request" not in log


@pytest.mark.parametrize("style", STYLES)
def test_each_key_style(style: str, api: Api):
    tensors, changes = styled_file(api.pipeline, style)
    url = api.serve(f"{style.replace(' ', '-')}.safetensors", _content(api.folder, tensors))
    actual = api.picture(loras=[{"path": url, "scale": 0.8}])
    expected = _plain(merged_by_hand(api.pipeline, [(changes, 0.8)]))
    assert np.abs(actual - expected).max() <= 1
    assert np.abs(actual - _plain(api.pipeline)).max() > 10


@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_pickles_give_the_pixels_of_the_safetensors_file(ending: str, api: Api):
    tensors, _ = styled_file(api.pipeline, "kohya, SDXL names", seed=2)
    torch.save(tensors, api.folder / f"made.{ending}")
    pickled = api.serve(f"pickled.{ending}", (api.folder / f"made.{ending}").read_bytes())
    plain = api.serve(f"same-as-{ending}.safetensors", _content(api.folder, tensors))
    first, second = (api.picture(loras=[{"path": url, "scale": 0.7}]) for url in (pickled, plain))
    assert np.abs(first - second).max() <= 1


def test_two_loras_with_different_scales(api: Api):
    files = [
        styled_file(api.pipeline, style, seed=seed) for seed, style in enumerate(("diffusers", "kohya, SDXL names"))
    ]
    scales = (0.9, -0.4)
    urls = [api.serve(f"two-{i}.safetensors", _content(api.folder, tensors)) for i, (tensors, _) in enumerate(files)]
    actual = api.picture(loras=[{"path": url, "scale": scale} for url, scale in zip(urls, scales, strict=True)])
    merged = merged_by_hand(api.pipeline, [(changes, scale) for (_, changes), scale in zip(files, scales, strict=True)])
    assert np.abs(actual - _plain(merged)).max() <= 1


@pytest.mark.parametrize("name", ["LoCon", "LoHa", "LoKr", "DoRA"])
def test_other_formats(name: str, api: Api):
    tensors, changes = whole_unet(api.pipeline.unet, name)
    url = api.serve(f"{name}.safetensors", _content(api.folder, tensors))
    answer = api.run(loras=[{"path": url, "scale": 1.0}])
    (entry,) = answer["output"]["loras"]
    assert entry["layers_applied"] == len(changes)
    merged = merged_by_hand(api.pipeline, [])
    for module, change in changes.items():
        merged.unet.get_parameter(f"{module}.weight").data.add_(change)
    assert np.abs(api.picture(loras=[{"path": url}]) - _plain(merged)).max() <= 1


def test_image_to_image(api: Api):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(buffer, "PNG")
    url = api.serve("start.png", buffer.getvalue())
    little, much = (api.picture(image_url=url, num_inference_steps=4, strength=strength) for strength in (0.25, 1.0))
    assert little.shape == (64, 64, 3)
    assert (little != much).any()
    missing = api.run(image_url=f"{url}-not", num_inference_steps=4)
    assert missing["error"].startswith("INVALID_INPUT: image_url")


def test_an_error_is_a_failed_status_with_a_code(api: Api):
    answer = api.run(width=1001, steps=3)
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("INVALID_INPUT: width must")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{nope", 422),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"input": null}', 422),
        (b'{"input": "text"}', 422),
        (b'{"input": {"prompt": "\xff"}}', 400),
        (b'{"input": {"seed": ' + b"9" * 5000 + b"}}", 400),
        (b'{"input": NaN}', 500),
        (b'{"input": "\\ud800"}', 500),
        (b'{"input": {}, "\\ud800": 1}', 500),
    ],
)
def test_what_the_sdk_refuses_before_the_worker_sees_it(api: Api, body: bytes, status: int):
    """README says so; a newer SDK that answers otherwise fails here."""
    headers = {"Content-Type": "application/json"}
    assert requests.post(f"{api.url}/runsync", data=body, headers=headers, timeout=PATIENCE).status_code == status


def test_plain_requests_keep_their_bits_after_good_and_bad_loras(api: Api):
    before = api.picture()
    tensors, _ = styled_file(api.pipeline, "diffusers")
    good = api.serve("good.safetensors", _content(api.folder, tensors))
    layer = layers_of(api.pipeline)["unet", "mid_block.attentions.0.proj_in"]
    misfit = kohya(
        "mid_block.attentions.0.proj_in", lora(torch.zeros(layer.get_parameter("weight").shape[0] + 1, 8))[0]
    )
    bad = api.serve("bad.safetensors", _content(api.folder, misfit))
    answer = api.run(loras=[{"path": good}, {"path": bad}])
    assert answer["error"].startswith("LORA_INCOMPATIBLE: ")
    assert np.array_equal(api.picture(), before)
    assert not np.array_equal(api.picture(loras=[good]), before)
    assert np.array_equal(api.picture(), before)
