"""A worker on the tiny model whose every bit, byte of memory and failure can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdxl_worker import topology
from sdxl_worker.generate.refiner import load_refiner
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.device_memory import Memory
from tests.support.lora_files import save, weight_hash, whole_unet

SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 5}
# One of each way to compute a change; the first is also the format whose files are merged in a way of their own.
FORMATS = ("LoRA", "LoHa", "LoKr", "DoRA")


class TinyWorker:
    """The tiny model in float16 with its refiner: the same code on the CPU as on a GPU, the VAE's cast included."""

    def __init__(self, device: str, folder: Path, **settings: Any) -> None:
        self.device, self.folder, self.memory = device, folder, Memory(device)
        pipeline = topology.build_sdxl(device=device, dtype=torch.float16)
        pipeline.set_progress_bar_config(disable=True)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        self.worker = Worker(Settings(model_id="tiny", refiner_id="tiny", lora_cache_dir=folder, **settings))
        self.pipeline, self.refiner = pipeline, load_refiner(self.worker.settings, pipeline)
        assert self.refiner is not None
        self.worker.resident.use(pipeline, self.refiner)
        topology.write_example_lora(folder)
        for name in FORMATS:
            save(folder / f"{name}.safetensors", whole_unet(pipeline.unet, name)[0])

    def answer(self, run: Any = None, **fields: Any) -> dict[str, Any]:
        """The answer to a small job with these fields."""
        return self.worker.run({"id": "job", "input": {**SMALL, **fields}}, run)

    def pictures(self, **fields: Any) -> list[str]:
        """The pictures of a job that has to succeed."""
        answer = self.answer(**fields)
        assert "images" in answer, answer
        return answer["images"]

    def bits(self) -> list[str]:
        """What has to be the same after each job: base model, refiner and schedulers."""
        assert self.refiner is not None
        return [weight_hash(self.pipeline), weight_hash(self.refiner.pipeline)]


def loras(*names: str, scale: float = 0.1) -> list[dict[str, Any]]:
    """These formats' files as entries of a request."""
    return [{"path": f"{name}.safetensors", "scale": scale} for name in names]
