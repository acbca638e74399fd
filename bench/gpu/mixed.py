"""A mixed run: jobs of many sizes, steps, samplers, LoRAs and modes in one fixed order, and the worker for them.

As a program it is that worker: handler.py around an SDXL with random weights of the size that BENCH_MODEL names.
"""

from __future__ import annotations

import base64
import io
import os
import random
import sys
from typing import Any

from PIL import Image

MODEL, DEVICE = "BENCH_MODEL", "BENCH_DEVICE"
# Files in the worker's cache folder, which it writes before it starts: lora0.safetensors and so on.
LORAS = 4

_SIZES = ((1024, 1024), (832, 1216), (1216, 832), (768, 1024), (768, 768), (512, 768), (512, 512))
_STEPS = (8, 12, 16, 20)
_SAMPLERS = ("K_EULER_ANCESTRAL", "K_EULER", "DPM++ 2M", "DDIM", "UniPC")
_PROMPTS = ("a lighthouse at dusk", "a cat on a wall", "fog over the sea, " * 12, "a red house in the snow")


def jobs(count: int, shrink: int = 1) -> list[dict[str, Any]]:
    """Inputs of `count` jobs, the same each time: half have LoRAs (1, 2 or 4), a quarter start from a picture.

    `shrink` divides sides (in steps of 8) and `steps`, for a small model.
    """
    dice = random.Random(0)
    start = _picture(max(64, 768 // shrink))
    made = []
    for number in range(count):
        width, height = (max(64, side // shrink // 8 * 8) for side in dice.choice(_SIZES))
        fields: dict[str, Any] = {
            "prompt": dice.choice(_PROMPTS),
            "negative_prompt": dice.choice((None, "blurry")),
            "width": width,
            "height": height,
            "num_inference_steps": max(2, dice.choice(_STEPS) // shrink),
            "guidance_scale": dice.choice((5.5, 7.0)),
            "scheduler": dice.choice(_SAMPLERS),
            "seed": number,
        }
        if number % 2:
            loras = (1, 2, LORAS)[number // 2 % 3]
            fields["loras"] = [{"path": f"lora{index}.safetensors", "scale": 0.5} for index in range(loras)]
        if number % 4 == 2:
            fields |= {"image": start, "strength": 0.6}
        made.append({name: value for name, value in fields.items() if value is not None})
    return made


def _picture(side: int) -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((side, side)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main() -> int:
    """Be the worker until it is told to stop."""
    import handler
    from bench.lora_files import write_loras
    from bench.models import random_pipeline

    worker = handler.process.worker
    pipeline = random_pipeline(os.environ[DEVICE], os.environ[MODEL])
    write_loras(pipeline, worker.settings.lora_cache_dir, LORAS)
    worker.resident.use(pipeline)
    return handler.main()


if __name__ == "__main__":
    sys.exit(main())
