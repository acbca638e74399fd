"""`Model hash` of a picture's text: the first 10 hex digits of a SHA-256, as A1111 shortens it.

A1111 and Civitai know a checkpoint by the SHA-256 of its one file, so that is what a single-file base model gets. A
folder of diffusers has no such file: its pictures name the file that holds the UNet, which tells two models apart but
is not in Civitai's list. `tiny` has no file at all: the hash is that of its UNet as a .safetensors file.
https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/sd_models.py (shorthash)
"""

from __future__ import annotations

import hashlib
import logging
import re
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_worker.background import in_background
from sdxl_worker.generate.base_model import BaseModel

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)

_DIGITS = 10
# Between two chunks the thread waits for its turn among Python's threads, up to 5 ms while another imports or draws:
# hashlib.file_digest's 0.25 MB could then be read at 50 MB/s only, and the first picture waits for the hash.
_CHUNK = 16 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def start_hashing(model: BaseModel, pipeline: StableDiffusionXLPipeline | None) -> Future[str]:
    """The future of `model_hash`, which a thread of its own reads the file for; "" where it cannot be read.

    `pipeline` may be None where there is a file. Without one the weights in memory are hashed before this returns: to
    be called before the first LoRA is merged.
    """

    def work() -> str:
        try:
            return model_hash(model, pipeline)
        except Exception as error:  # a job waits for the hash: it does without, whatever the file does
            logger.warning("Model hash is left out: %s", getattr(error, "strerror", None) or type(error).__name__)
            return ""

    if model.path is not None:
        return in_background(work, "model hash")
    future: Future[str] = Future()
    future.set_result(work())
    return future


def model_hash(model: BaseModel, pipeline: StableDiffusionXLPipeline | None) -> str:
    """The hash, or "" where the UNet is not one .safetensors file.

    A file of the Hub's cache costs nothing: its blob is named by its SHA-256. Any other is read once, 1 to 2 GB/s.
    Raises OSError.
    """
    if model.path is None:
        from safetensors.torch import save

        assert pipeline is not None, "a model without a file is in memory"
        return hashlib.sha256(save(pipeline.unet.state_dict())).hexdigest()[:_DIGITS]
    path = model.path if model.kind == "file" else model.path / "unet" / _unet_file(model)
    return _sha256(path)[:_DIGITS] if path.is_file() else ""


def _unet_file(model: BaseModel) -> str:
    precision = f".{model.variant}" if model.variant else ""
    return f"diffusion_pytorch_model{precision}.safetensors"


def _sha256(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(blob):
        return blob
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
