"""`python -m tests.gpu.lost_device DEVICE LORA...`: a worker that loses its device within a job; its answers as JSON.

One job that is well, one in which the device is lost, one after it; all with these LoRAs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.gpu.tiny_worker import TinyWorker, loras


def lose(device: str) -> None:
    """An index out of range, which stops a kernel by its assertion: CUDA then refuses everything in this process."""
    if device == "cpu":
        raise RuntimeError("CUDA error: device-side assert triggered")
    table, index = torch.zeros(4, device=device), torch.tensor([1 << 20], device=device)
    table[index]


def main(device: str, names: list[str]) -> None:
    """Write the answers, the pictures left out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is kept: a file's page-locked memory would go with its job.
        tiny = TinyWorker(device, Path(folder), lora_ram_cache_gb=0)
        fields = {"loras": loras(*names)} if names else {}
        answers = [tiny.answer(**fields)]
        # Amid the UNet, where nothing is on its way from page-locked memory: taking that back would end the process.
        hook = tiny.pipeline.unet.mid_block.register_forward_pre_hook(lambda *_: lose(device))
        answers.append(tiny.answer(**fields))
        hook.remove()
        answers.append(tiny.answer(**fields))
        tiny.worker.close()
    told = [{**answer, "images": len(answer.get("images", [])), "image_url": ""} for answer in answers]
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
