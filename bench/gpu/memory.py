"""Peak memory of requests: bare, and through the worker, with LoRAs and with several pictures."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.gpu.requests import answered, fields, worker_with_loras
from bench.instruments import Memory


def measure(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Peaks in bytes; on a CPU those of the process, which holds more than the weights."""
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    weights = sum(value.numel() * value.element_size() for module in modules for value in module.parameters())
    memory = Memory(pipeline.device.type)

    def bare() -> None:
        with torch.no_grad():
            pipeline("a lighthouse", width=options.size, height=options.size, num_inference_steps=options.steps)

    with worker_with_loras(pipeline, 4) as (worker, loras):
        request = fields(options.size, options.steps)
        cases = {
            "bare diffusers": bare,
            "worker": lambda: answered(worker, request),
            "worker, 1 LoRA": lambda: answered(worker, {**request, "loras": loras[:1]}),
            "worker, 4 LoRAs": lambda: answered(worker, {**request, "loras": loras}),
            "worker, 4 pictures": lambda: answered(worker, {**request, "num_images": 4}),
            "worker, plain again": lambda: answered(worker, request),
        }
        peaks = {}
        for name, action in cases.items():
            memory.reset()
            action()
            peaks[name] = memory.peak()
    ratios = {name: peak / peaks["bare diffusers"] for name, peak in peaks.items()}
    return {"weights_bytes": weights, "peak_bytes": peaks, "ratio": ratios}
