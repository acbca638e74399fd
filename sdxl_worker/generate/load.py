"""Load the resident SDXL pipeline."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker import topology
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.base_model import BaseModel, find_base_model, find_vae
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)


def load_pipeline(settings: Settings) -> StableDiffusionXLPipeline:
    """The resident pipeline: float16 on the GPU where there is one, else float32 on the CPU.

    Raises ModelUnavailable, with one sentence that says what to set or run.
    """
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = find_base_model(settings)
    if model.kind == "tiny":
        topology.write_example_lora(settings.lora_cache_dir)
        pipeline = topology.build_sdxl(topology.TINY, dtype=dtype, device=device)
    else:
        pipeline = _load_from_disk(model, settings, dtype, device)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            # Once and for all: diffusers' eval() leaves it on, and some CPU kernels round differently with it.
            module.eval().requires_grad_(False)
    return pipeline


def _load_from_disk(model: BaseModel, settings: Settings, dtype: torch.dtype, device: str) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    options: dict[str, Any] = {"dtype": dtype, "add_watermarker": False}
    vae_path = find_vae(settings) if model.allow_vae_override and device == "cuda" else None
    try:
        if vae_path is not None:
            from diffusers import AutoencoderKL

            options["vae"] = AutoencoderKL.from_pretrained(str(vae_path), dtype=dtype)
        if model.kind == "file":
            pipeline = StableDiffusionXLPipeline.from_single_file(str(model.path), **options, **_configs(model))
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(str(model.path), variant=_variant(model), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        logger.exception("loading %s failed", model.name)
        reason = "it is not a complete SDXL model"
        raise ModelUnavailable(f"the base model {model.name} cannot be loaded: {reason}; check MODEL_ID") from error
    return pipeline.to(device)


def _configs(model: BaseModel) -> dict[str, str]:
    """A single file has no configs and tokenizers: a folder of its name beside it may hold them, else the Hub does."""
    assert model.path is not None
    folder = model.path.with_suffix("")
    return {"config": str(folder)} if (folder / "model_index.json").is_file() else {}


def _variant(model: BaseModel) -> str | None:
    """`fp16` when the folder holds half-precision weights under that name and nothing else has to be preferred."""
    assert model.path is not None
    return "fp16" if any(model.path.glob("unet/*.fp16.safetensors")) else None
