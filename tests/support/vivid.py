"""Makes a tiny SDXL one, with its refiner, on whose pictures every word shows."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_worker.generate.refiner import Refiner, load_refiner
from sdxl_worker.settings import Settings


def made_vivid(base: Any) -> Refiner:
    """The refiner on `base`, a tiny SDXL that is frozen and whose encoders give large values to words from now on.

    The refiner's UNet listens to them, the base model's as it comes.
    """
    base.set_progress_bar_config(disable=True)
    refiner = load_refiner(Settings(refiner_id="tiny"), base)
    assert refiner is not None
    with torch.no_grad():
        for encoder in (base.text_encoder, base.text_encoder_2):
            encoder.get_input_embeddings().weight.mul_(20)
    listening(refiner.pipeline.unet)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(base, name).eval().requires_grad_(False)
    return refiner


@torch.no_grad()
def listening(unet: Any) -> None:
    """Make what the words say weigh more."""
    for name, module in unet.named_modules():
        # Queries and keys stay: softmax over larger ones would make noise of the last bit.
        if name.endswith("attn2.to_v"):
            module.get_parameter("weight").mul_(40)
