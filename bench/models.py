"""The models that are measured: SDXL's structure with random weights, as the worker keeps its own."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_worker import topology

SIZES = {"full": topology.FULL, "narrow": topology.NARROW, "tiny": topology.TINY}


def random_pipeline(device: str, model: str = "") -> Any:
    """One of SIZES (full on a GPU, narrow on the CPU), made on the device: float16 on a GPU, float32 on the CPU."""
    on_gpu = device == "cuda"
    size = SIZES[model or ("full" if on_gpu else "narrow")]
    pipeline = topology.build_sdxl(size, dtype=torch.float16 if on_gpu else torch.float32, device=device)
    pipeline.set_progress_bar_config(disable=True)
    # As madebyollin/sdxl-vae-fp16-fix says, the VAE of worker-sdxl and of this worker on a GPU: float16 is enough.
    pipeline.vae.register_to_config(force_upcast=False)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipeline
