"""One request to a bare pipeline, with the time of each of its steps."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from bench.instruments import Clock


class Request:
    """One fixed-seed request; `render` returns the picture and records the seconds of each denoising step."""

    def __init__(self, pipeline: Any, clock: Clock, size: int, steps: int):
        self.pipeline, self.clock, self.size, self.steps = pipeline, clock, size, steps
        self.step_times: list[float] = []

    def render(self) -> np.ndarray:
        """The picture as uint8 (height, width, 3)."""
        begun = 0.0

        def before_unet(_unet: Any, _arguments: Any) -> None:
            nonlocal begun
            self.clock.wait()
            begun = time.perf_counter()

        def after_step(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            self.clock.wait()
            self.step_times.append(time.perf_counter() - begun)
            return {}

        self.step_times = []
        generator = torch.Generator(self.pipeline.device).manual_seed(0)
        with torch.no_grad(), self.pipeline.unet.register_forward_pre_hook(before_unet):
            image = self.pipeline(
                "a lighthouse at dusk",
                width=self.size,
                height=self.size,
                num_inference_steps=self.steps,
                generator=generator,
                callback_on_step_end=after_step,
            ).images[0]
        return np.asarray(image)

    def timed(self) -> tuple[float, float, np.ndarray]:
        """Seconds of the whole render, seconds of its fastest step, and the picture.

        The fastest, because what a shared machine adds to a step is never negative and often more than the 2% at stake.
        """
        pictures: list[np.ndarray] = []
        whole = self.clock.time(lambda: pictures.append(self.render()))
        return whole, min(self.step_times), pictures[0]
