"""The sorts of jobs that a soak mixes: every mode, with cancels, bad pictures and failures among them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_worker.topology import EXAMPLE_LORA
from tests.soak.faults import BREAKS, NEVER_FITS, NOT_A_NUMBER, TWO_FIT
from tests.support.http_server import FileServer, cut, drip, status, whole

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 4, "seed": 1}
# Takes minutes unless it is stopped: whoever has seen it denoise has time to do so.
ENDLESS = {"width": 512, "height": 512, "num_inference_steps": 200}


@dataclass(frozen=True)
class Kind:
    """A sort of job: its input, and what has to come of it: `pictures`, the code of an error, or nothing.

    With `stop_at` it is stopped once it has reported that stage, and that step of it.
    """

    name: str
    fields: Any
    pictures: int = 1
    error: str = ""
    stop_at: str = ""
    step: int = 0


def kinds(server: FileServer, cache: Path) -> list[Kind]:
    """All of them; `server` then serves what they name by URL, and `cache` holds what they name as a file."""
    url = _serve(server, (cache / EXAMPLE_LORA).read_bytes())
    save_file({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 24)}, cache / "odd.safetensors")
    return [
        *_text_to_image(url),
        *_image_to_image(url),
        *_inpainting(url),
        *_hires(url),
        *_refiner(url),
        *_few_steps(url),
        *_several(),
        *_stopped(url),
        *_failures(url),
    ]


def _serve(server: FileServer, lora: bytes) -> str:
    start = _png(Image.linear_gradient("L").convert("RGB").resize((96, 80)))
    server.add("/start.png", whole(start))
    mask = Image.new("L", (96, 80), 0)
    mask.paste(255, (16, 16, 64, 56))
    server.add("/mask.png", whole(_png(mask)))
    server.add("/black.png", whole(_png(Image.new("L", (96, 80), 0))))
    server.add("/half.png", whole(start[: len(start) // 2]))
    server.add("/cut.png", cut(start, after=len(start) // 2))
    server.add("/page.png", status(200, b"<html>not here</html>", content_type="text/html"))
    for name in ("style", "sdxl_lightning_4step_lora", "dmd2_sdxl_4step_lora"):
        server.add(f"/{name}.safetensors", whole(lora))
    server.add("/page.safetensors", status(200, b"<html>not here</html>", content_type="text/html"))
    server.add("/slow.safetensors", drip(lora[:2000]))
    return server.origin


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _drawn(name: str, pictures: int = 1, **fields: Any) -> Kind:
    return Kind(name, {**SMALL, **fields}, pictures)


def _fails(name: str, error: str, **fields: Any) -> Kind:
    return Kind(name, {**SMALL, **fields}, error=error)


def _text_to_image(url: str) -> list[Kind]:
    tags: dict[str, Any] = {"prompt_syntax": "a1111"}
    return [
        _drawn("plain"),
        _drawn("other seed", seed=2),
        _drawn("lora", loras=[{"path": EXAMPLE_LORA, "scale": 0.8}]),
        _drawn("lora inverted", loras=[{"path": EXAMPLE_LORA, "scale": -1}]),
        _drawn("two loras", loras=[{"path": EXAMPLE_LORA, "scale": 0.5}, f"{url}/style.safetensors"]),
        _drawn("lora on the first steps", loras=[{"path": EXAMPLE_LORA, "end": 0.5}]),
        _drawn(
            "loras one after the other",
            loras=[{"path": EXAMPLE_LORA, "end": 0.5}, {"path": EXAMPLE_LORA, "start": 0.5, "scale": -1}],
        ),
        _drawn("lora tag", prompt="a house <lora:tiny-example:0.4:0.9>", **tags),
        _drawn("weights", prompt="a (red:1.4) house BREAK in [snow]", negative_prompt="(fog:1.2)", **tags),
        _drawn("long prompt", prompt="fog over the sea, " * 20, **tags),
        _drawn("embedding", prompt="an odd house", embeddings=["odd"], **tags),
        _drawn("clip skip", clip_skip=1),
        _drawn("Heun Karras", scheduler="Heun", schedule_type="karras"),
        _drawn("DPM++ SDE", scheduler="DPM++ SDE"),
        _drawn("DDIM with eta", scheduler="DDIM", eta=0.7, guidance_rescale=0.5),
        _drawn("guidance that ends", cfg_end=0.5),
        _drawn("deep cache", deep_cache=2, loras=[{"path": EXAMPLE_LORA, "end": 0.5}]),
        _drawn("DPM++ 2M SGM", scheduler="DPM++ 2M", schedule_type="sgm_uniform"),
        _drawn("webp with previews", output_format="webp", preview=True),
        Kind("inspection", {**SMALL, "prompt": "a (cat:1.3)", "inspect_prompt": True, **tags}, pictures=0),
    ]


def _image_to_image(url: str) -> list[Kind]:
    picture = Image.radial_gradient("L").resize((70, 90))
    return [
        _drawn("image", image_url=f"{url}/start.png", strength=0.6),
        _drawn("image with a lora", image_url=f"{url}/start.png", strength=0.6, loras=[EXAMPLE_LORA]),
        _drawn("image brought along", image=_data_uri(_png(picture)), strength=0.6, prompt="a (dog:1.3)"),
        _drawn("image given back", image_url=f"{url}/start.png", strength=0),
    ]


def _masked(url: str) -> dict[str, Any]:
    return {"image_url": f"{url}/start.png", "mask_url": f"{url}/mask.png"}


def _inpainting(url: str) -> list[Kind]:
    both = _masked(url)
    return [
        _drawn("inpainting", **both),
        _drawn(
            "inpainting with a lora", 2, **both, loras=[EXAMPLE_LORA], prompts=["a (cat:1.3)", "a dog"], prompt=None
        ),
        _drawn("inpainting turned round", **both, invert_mask=True, mask_blur=0, scheduler="Heun"),
        _drawn(
            "inpainting around the mask", 2, **both, inpaint_full_res=True, inpaint_padding=8, seed=None, seeds=[3, 3]
        ),
        _drawn("outpainting", image_url=both["image_url"], extend={"left": 32, "bottom": 16}),
    ]


def _hires(url: str) -> list[Kind]:
    return [
        _drawn("hires", hires={"scale": 2, "steps": 3}),
        _drawn("hires by lanczos", 2, hires={"scale": 1.5, "upscaler": "lanczos"}, loras=[EXAMPLE_LORA], num_images=2),
        _drawn("hires of an image", image_url=f"{url}/start.png", strength=0.5, hires={"scale": 1.5, "strength": 0.6}),
    ]


def _refiner(url: str) -> list[Kind]:
    return [
        _drawn("refiner", refiner_inference_steps=10),
        _drawn("refiner goes on", 2, high_noise_frac=0.5, loras=[EXAMPLE_LORA], num_images=2),
        _drawn("refiner as in worker-sdxl", high_noise_frac=0.5, refiner_inference_steps=10, strength=0.3),
        _drawn("refiner alone", image_url=f"{url}/start.png", refiner_inference_steps=10),
    ]


def _few_steps(url: str) -> list[Kind]:
    bare = {name: value for name, value in SMALL.items() if name != "num_inference_steps"}
    lightning, dmd2 = f"{url}/sdxl_lightning_4step_lora.safetensors", f"{url}/dmd2_sdxl_4step_lora.safetensors"
    return [
        Kind("Lightning", {**bare, "loras": [lightning]}),
        Kind("DMD2", {**bare, "loras": [dmd2, EXAMPLE_LORA], "num_images": 2}, pictures=2),
        Kind("Lightning on an image", {**bare, "loras": [lightning], "image_url": f"{url}/start.png"}),
        _drawn("Lightning overridden", loras=[lightning], scheduler="DDIM", guidance_scale=7),
    ]


def _several() -> list[Kind]:
    prompts = ["a cat", "a (cat:1.5)", "a dog BREAK snow", "a cat"]
    return [
        _drawn("eight pictures", 8, num_images=8),
        _drawn("seeds", 3, seed=None, seeds=[5, 900, 5], loras=[EXAMPLE_LORA]),
        _drawn("prompts", 4, prompt=None, prompts=prompts, prompt_syntax="a1111", negative_prompt="fog"),
        _drawn("more than fit at once", 5, width=TWO_FIT, num_images=5),
    ]


def _stopped(url: str) -> list[Kind]:
    endless = {**SMALL, **ENDLESS}
    refined = {"num_inference_steps": 2, "refiner_inference_steps": 200, "strength": 1}
    second = {"num_inference_steps": 2, "width": 256, "height": 256, "hires": {"scale": 3, "steps": 150}}
    return [
        Kind("stopped", endless, stop_at="denoising"),
        Kind("stopped with a lora", {**endless, "loras": [EXAMPLE_LORA]}, stop_at="denoising"),
        Kind(
            "stopped between loras",
            {**endless, "loras": [{"path": EXAMPLE_LORA, "start": 0.01}]},
            stop_at="denoising",
            step=3,
        ),
        Kind("stopped image", {**endless, "image_url": f"{url}/start.png", "strength": 1}, stop_at="denoising"),
        Kind("stopped inpainting", {**endless, **_masked(url), "strength": 1}, stop_at="denoising"),
        Kind("stopped second pass", {**endless, **second, "loras": [EXAMPLE_LORA]}, stop_at="denoising", step=3),
        Kind("stopped refiner", {**endless, **refined, "loras": [EXAMPLE_LORA]}, stop_at="denoising", step=3),
        Kind("stopped download", {**SMALL, "loras": [f"{url}/slow.safetensors"]}, stop_at="downloading"),
    ]


def _failures(url: str) -> list[Kind]:
    return [
        Kind("no input", None, error="INVALID_INPUT"),
        _fails("no prompt", "INVALID_INPUT", prompt=None),
        _fails("bad fields", "INVALID_INPUT", width=1001, foo="\ud800"),
        _fails("seeds that do not fit", "INVALID_INPUT", seed=None, seeds=[1, 2], num_images=3),
        _fails("no such lora", "LORA_NOT_FOUND", loras=["not-there"]),
        _fails("lora that is a page", "NOT_A_LORA", loras=[f"{url}/page.safetensors"]),
        _fails("lora outside", "LORA_REFERENCE", loras=["../outside"]),
        _fails("half a picture", "INVALID_INPUT", image_url=f"{url}/half.png"),
        _fails("picture that is a page", "INVALID_INPUT", image_url=f"{url}/page.png"),
        _fails("picture that is not there", "INVALID_INPUT", image_url=f"{url}/missing.png"),
        _fails("picture of junk", "INVALID_INPUT", image=_data_uri(b"no picture at all")),
        _fails("mask of nothing", "INVALID_INPUT", image_url=f"{url}/start.png", mask_url=f"{url}/black.png"),
        _fails("mask without a picture", "INVALID_INPUT", mask_url=f"{url}/mask.png"),
        _fails("hires beyond its scale", "INVALID_INPUT", hires={"scale": 4}),
        _fails("not even one fits", "OUT_OF_MEMORY", width=NEVER_FITS, num_images=2),
        _fails("breaks half-way", "INTERNAL", width=BREAKS, loras=[EXAMPLE_LORA]),
        _fails("not a number", "GENERATION_FAILED", width=NOT_A_NUMBER, num_images=2),
    ]
