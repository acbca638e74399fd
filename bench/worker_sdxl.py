"""worker-sdxl's set-up, which speed and pixels are held against; `bench.rendering` says what it is and leaves out."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.validation import validate_request

PROMPT, SEED, GUIDANCE, SCHEDULER = "a lighthouse at dusk", 1, 7.5, "DDIM"


def bare(pipeline: Any, request: GenerationRequest) -> Any:
    """The picture as worker-sdxl calls diffusers for it."""
    from diffusers import DDIMScheduler

    before = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(before.config)
    try:
        with torch.inference_mode():
            return pipeline(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                num_images_per_prompt=1,
                generator=torch.Generator(pipeline.device).manual_seed(SEED),
            ).images[0]
    finally:
        pipeline.scheduler = before


def request_of(options: argparse.Namespace, **fields: Any) -> GenerationRequest:
    """The request of all rows: worker-sdxl's scheduler and guidance."""
    common = {"prompt": PROMPT, "width": options.size, "height": options.size, "seed": SEED, "scheduler": SCHEDULER}
    return validate_request({**common, "guidance_scale": GUIDANCE, "num_inference_steps": options.steps, **fields})


def difference(picture: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Greatest and mean difference of a channel (0 to 255), and the share of pixels with any."""
    apart = np.abs(picture - baseline)
    return {"max": int(apart.max()), "mean": float(apart.mean()), "share": float((apart > 0).any(-1).mean())}
