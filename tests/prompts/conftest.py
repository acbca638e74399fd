"""A tiny SDXL on whose pictures every word and weight shows: with random weights alone they hardly would."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdxl_worker import topology

# Deep enough for clip_skip 4.
SIZE = dataclasses.replace(topology.TINY, text=(16, 4, 2), text_2=(24, 5, 2))


@pytest.fixture(scope="session")
def vivid():
    """Float32 on the CPU; tests put back what they change. A weight of 1.4 for 1.5 changes a channel by 18 of 255."""
    pipeline = topology.build_sdxl(SIZE)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name, module in pipeline.unet.named_modules():
            if ".attn2.to_" in name and isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)
        for layer in (pipeline.unet.add_embedding.linear_1, pipeline.unet.add_embedding.linear_2):
            layer.weight.mul_(2)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.get_input_embeddings().weight.mul_(20)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline
