"""The models that are measured: SDXL's structure with random weights, as the worker keeps its own."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_worker import topology


def random_pipeline(device: str, *, tiny: bool = False) -> Any:
    """Full-size and float16 on a GPU; on the CPU float32 and about 1/8 of the width, or `tiny`."""
    on_cpu = topology.TINY if tiny else topology.NARROW
    size, dtype = (topology.FULL, torch.float16) if device == "cuda" else (on_cpu, torch.float32)
    pipeline = topology.build_sdxl(size, dtype=dtype, device=device)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipeline
