"""The text that a picture carries about how it was made, in the form that A1111, ComfyUI and Civitai read.

    prompt <lora:name:scale>
    Negative prompt: ...
    Steps: 28, Sampler: Euler a, Schedule type: Automatic, CFG scale: 5.5, Seed: 7, Size: 1024x1024,
    Model hash: hash, Model: name, Lora hashes: "name: hash", TI hashes: "token: hash"

https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/infotext_utils.py reads it;
what the hashes are is said in UsedLora and in generate.model_hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sdxl_worker.lora.used import UsedLora, safe_name
from sdxl_worker.prompts.embeddings import Embedding
from sdxl_worker.request import DEFAULT_CLIP_SKIP, GenerationRequest
from sdxl_worker.request.refinement import refinement_of
from sdxl_worker.schedulers import SCHEDULERS, SCHEDULES


@dataclass(frozen=True)
class Used:
    """What the pictures were made with beside the model.

    `embeddings` are those of each prompt; `refiner` is the refiner's name and hash, as A1111 writes them.
    """

    loras: Sequence[UsedLora] = ()
    embeddings: Sequence[Sequence[Embedding]] = ()
    refiner: str = ""

    def embeddings_of(self, index: int) -> Sequence[Embedding]:
        """Those that the prompt of picture `index` or the negative prompt uses."""
        return self.embeddings[min(index, len(self.embeddings) - 1)] if self.embeddings else ()


NOTHING_USED = Used()


def image_seed(request: GenerationRequest, index: int) -> int:
    """The seed that draws picture `index` of the request when it is asked for alone."""
    return request.seeds[index] if request.seeds else (request.seed + index) % 2**64


def infotext(
    request: GenerationRequest, index: int, model_id: str, used: Used = NOTHING_USED, *, model_hash: str = ""
) -> str:
    """The text for picture `index` of `request`; `model_id` is shown without its folder or query.

    The prompt is as it was sent, followed by tags for the LoRAs that it has none for. `model_hash` is that of
    generate.model_hash, left out when empty.
    """
    prompt = " ".join([request.prompt_of(index), *(lora.tag for lora in used.loras if not lora.in_prompt)])
    lines = [prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    facts: dict[str, Any] = {
        **_sampler_facts(request),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": image_seed(request, index),
        "Size": f"{request.width}x{request.height}",
    }
    if model_hash:
        facts["Model hash"] = model_hash
    facts["Model"] = safe_name(model_name(model_id))
    facts |= _picture_facts(request)
    facts |= _hires_facts(request)
    facts |= _refiner_facts(request, used.refiner)
    if request.clip_skip != DEFAULT_CLIP_SKIP:
        facts["Clip skip"] = request.clip_skip
    if request.prompt_syntax == "a1111" and request.prompt_emphasis == "no_norm":
        facts["Emphasis"] = "No norm"
    named = {
        "Lora hashes": [(lora.short_name, lora.hash) for lora in used.loras],
        "TI hashes": [
            (safe_name(embedding.token), embedding.short_hash)
            for embedding in used.embeddings_of(index)
            if not embedding.is_bundled
        ],
    }
    for name, hashes in named.items():
        if hashes:
            facts[name] = json.dumps(", ".join(f"{of}: {short}" for of, short in hashes), ensure_ascii=False)
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def _picture_facts(request: GenerationRequest) -> dict[str, str | int]:
    if not request.starts_from_picture:
        return {}
    facts: dict[str, str | int] = {"Denoising strength": f"{request.denoising_strength:g}"}
    if request.is_inpainting and request.mask_blur:
        facts["Mask blur"] = f"{request.mask_blur:g}"
    if "mask_url" in request.pictures and request.invert_mask:
        facts["Mask mode"] = "Inpaint not masked"
    if "mask_url" in request.pictures and request.inpaint_full_res:
        facts |= {"Inpaint area": "Only masked", "Masked area padding": request.inpaint_padding}
    return facts


def _hires_facts(request: GenerationRequest) -> dict[str, Any]:
    """A1111's names for `hires`, whose strength then is "the" strength; that of a first pass has a name of our own."""
    hires = request.hires
    if hires is None:
        return {}
    first = {"First pass denoising strength": f"{request.denoising_strength:g}"} if request.starts_from_picture else {}
    return {
        "Denoising strength": f"{hires.strength:g}",
        **first,
        "Hires upscale": f"{hires.scale:g}",
        "Hires steps": hires.steps or request.num_inference_steps,
        "Hires upscaler": hires.upscaler.capitalize(),
    }


def _sampler_facts(request: GenerationRequest) -> dict[str, Any]:
    """What A1111 writes, and what it does not have: timesteps, and what changes a step."""
    scheduler = SCHEDULERS[request.scheduler]
    facts: dict[str, Any] = {
        "Steps": request.num_inference_steps,
        "Sampler": scheduler.display_name,
        "Schedule type": SCHEDULES[request.schedule_type].display_name,
    }
    if request.eta is not None and scheduler.eta is not None:
        facts["Eta DDIM"] = f"{request.eta:g}"
    if request.timesteps is not None:
        facts["Timesteps"] = " ".join(map(str, request.timesteps))
    if request.guidance_rescale:
        facts["Guidance rescale"] = f"{request.guidance_rescale:g}"
    if request.cfg_end < 1 < request.guidance_scale:
        facts["CFG end"] = f"{request.cfg_end:g}"
    if request.deep_cache > 1:
        facts["DeepCache interval"] = request.deep_cache
    return facts


def _refiner_facts(request: GenerationRequest, refiner: str) -> dict[str, Any]:
    """A1111 knows the first two; its `Refiner switch at` is where the base model stops and the refiner goes on."""
    plan = refinement_of(request)
    if plan is None:
        return {}
    facts: dict[str, Any] = {"Refiner": refiner or safe_name(request.refiner)}
    if plan.switch_at is not None:
        facts["Refiner switch at"] = f"{plan.switch_at:g}"
    if plan.steps != request.num_inference_steps or plan.strength is not None:
        facts["Refiner steps"] = plan.steps
    if plan.strength is not None:
        facts["Refiner strength"] = f"{plan.strength:g}"
    return facts


def model_name(model_id: str) -> str:
    """The last part of a repo id, path or URL, without its suffix: safe to show."""
    path = PurePosixPath(urlsplit(model_id).path if "://" in model_id else model_id)
    return path.stem if path.suffix in (".safetensors", ".ckpt") else path.name
