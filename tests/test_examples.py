"""Each file of examples/ is a ready request: valid as it stands, and rendered by the tiny model at a small size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.few_step import recognised
from sdxl_worker.generate.refiner import load_refiner
from sdxl_worker.kinds import EMBEDDING, LORA
from sdxl_worker.request.validation import validate_request
from sdxl_worker.settings import Settings
from sdxl_worker.topology import EXAMPLE_LORA, write_example_lora
from sdxl_worker.worker import Worker
from tests.support import http_server as on
from tests.support.embedding_files import save_embedding, vectors
from tests.support.hostile_pictures import saved
from tests.support.http_server import FileServer
from tests.support.readme import README, ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


def load(path: Path) -> dict[str, Any]:
    body = json.loads(path.read_text(encoding="utf-8"))
    assert list(body) == ["input"], "a whole body, as it is sent"
    return body["input"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_as_it_stands(path: Path) -> None:
    fields = load(path)
    request = validate_request(fields, "a refiner")
    assert request.warnings == ()
    assert len(request.loras) == len(fields.get("loras", []))
    for lora in request.loras:
        parse_reference(lora.reference, Settings(), LORA)
    for embedding in request.embeddings:
        parse_reference(embedding.reference, Settings(), EMBEDDING)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    """Serves a small picture, and a mask for it."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    start, mask = Image.new("RGB", (80, 64), "teal"), Image.new("L", (80, 64), 0)
    mask.paste(255, (20, 20, 60, 44))
    with FileServer() as running:
        running.add("/image_url.png", on.whole(saved(start, "PNG")))
        running.add("/mask_url.png", on.whole(saved(mask, "PNG")))
        yield running


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_renders(path: Path, pipeline, engine, server: FileServer, tmp_path: Path, monkeypatch) -> None:
    """Small, in a few steps, with the tiny model's LoRA and a local picture in place of those of the internet."""
    fields = load(path) | {"width": 64, "height": 64, "num_inference_steps": 4}
    fields |= {name: f"{server.origin}/{name}.png" for name in ("image_url", "mask_url") if name in fields}
    write_example_lora(tmp_path)
    few_step = [lora for lora in fields.get("loras", []) if recognised([lora["path"]])]
    for lora in fields.get("loras", []):
        lora["path"] = own_name(lora["path"], tmp_path) if lora in few_step else EXAMPLE_LORA
    if few_step:
        del fields["num_inference_steps"]
    if "prompt" in fields:
        fields["prompt"] = re.sub(r"<lora:\S+?((?::[\d.]+)*)>", rf"<lora:{EXAMPLE_LORA}\1>", fields["prompt"])
    for embedding in fields.get("embeddings", []):
        embedding["path"] = save_embedding(tmp_path / "embedding.safetensors", vectors(pipeline, 2)).name
    worker = Worker(Settings(model_id="tiny", refiner_id="tiny", lora_cache_dir=tmp_path))
    worker.resident.use(pipeline, load_refiner(worker.settings, pipeline))
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    answer = worker.run({"id": "example", "input": fields})
    lists = [len(fields[name]) for name in ("seeds", "prompts") if name in fields]
    assert len(answer.get("images", [])) == fields.get("num_images", max(lists, default=1)), answer
    seeds = fields.get("seeds") or [fields["seed"] + index for index in range(len(answer["images"]))]
    assert (answer["seed"], answer.get("seeds", seeds)) == (seeds[0], seeds)
    assert len(answer.get("loras", [])) == len(fields.get("loras", [])) + fields.get("prompt", "").count("<lora:")
    assert len(answer.get("used_embeddings", [])) == len(fields.get("embeddings", []))
    assert len(answer.get("settings", {}).get("chosen", [])) >= (3 if few_step else 0)
    assert "warnings" not in answer


def own_name(reference: str, folder: Path) -> str:
    """The tiny model's LoRA under the name that the reference has at its end."""
    name = f"{Path(reference).name.removesuffix('.safetensors')}.safetensors"
    shutil.copy(folder / EXAMPLE_LORA, folder / name)
    return name


def test_the_readme_leads_to_the_examples() -> None:
    led_to = (
        *("lora", "image_to_image", "worker_sdxl", "embedding", "lora_tags", "lora_steps", "seeds", "prompts"),
        *("inpaint", "inpaint_full_res", "inpaint_data_uris", "outpaint", "hires", "refiner"),
        *("few_step", "few_step_and_style"),
    )
    assert [name for name in led_to if f"examples/{name}.json" not in README] == []
