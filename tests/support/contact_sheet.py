"""`python -m tests.support.contact_sheet docs/hires.png`: README's pictures of `hires`, drawn by the tiny model."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

SMALL: dict[str, Any] = {"prompt": "a lighthouse", "width": 128, "height": 96, "num_inference_steps": 20, "seed": 4}
SECOND: dict[str, Any] = {"scale": 2, "steps": 20, "strength": 0.4}
# One picture each, from left to right.
REQUESTS: tuple[dict[str, Any], ...] = (
    SMALL,
    {**SMALL, "hires": {**SECOND, "upscaler": "latent"}},
    {**SMALL, "hires": {**SECOND, "upscaler": "lanczos"}},
)
GAP = 8


def main(path: Path) -> None:
    """Draw the requests and put their pictures side by side into the file at `path`."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Settings(model_id="tiny", lora_cache_dir=Path(folder)))
        pictures = [_drawn(worker, request) for request in REQUESTS]
    width = sum(picture.width + GAP for picture in pictures) - GAP
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    sheet.quantize(64).save(path, optimize=True)


def _drawn(worker: Worker, request: dict[str, Any]) -> Image.Image:
    answer = worker.run({"id": "sheet", "input": request})
    if "error" in answer:
        raise SystemExit(answer["error"])
    return Image.open(io.BytesIO(base64.b64decode(answer["image_url"].partition(",")[2]))).convert("RGB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
