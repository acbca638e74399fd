"""Load the small VAE that previews are drawn with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.base_model import BaseModel
from sdxl_worker.generate.infotext import model_name
from sdxl_worker.generate.load import reading
from sdxl_worker.generate.vae_files import find_preview_vae
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

ROLE = "preview VAE"
_CLASS, _LATENT_CHANNELS = "AutoencoderTiny", 4


def load_preview_vae(settings: Settings, pipeline: StableDiffusionXLPipeline) -> Any | None:
    """The AutoencoderTiny of PREVIEW_VAE_ID, on the pipeline's device and in its dtype; None when it is empty.

    Raises ModelUnavailable.
    """
    path = find_preview_vae(settings)
    if path is None:
        return None
    from diffusers import AutoencoderTiny

    model = BaseModel("folder", path, model_name(settings.preview_vae_id), allow_vae_override=False)
    with reading(model, "PREVIEW_VAE_ID", ROLE):
        # Read first: weights of another class would be left out in silence, and random ones be taken.
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) if path.is_dir() else {}
        fits = (config.get("_class_name"), config.get("latent_channels", 4)) == (_CLASS, _LATENT_CHANNELS)
        if fits:
            vae = AutoencoderTiny.from_pretrained(str(path), dtype=pipeline.unet.dtype).to(pipeline.device)
            return vae.eval().requires_grad_(False)
    raise ModelUnavailable(
        f"the {ROLE} {model.name} is not a diffusers folder or repo of an {_CLASS} for SDXL; check PREVIEW_VAE_ID"
    )
