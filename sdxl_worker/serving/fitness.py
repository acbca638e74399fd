"""What a worker must be able to do before it takes its first job, and the line it says about itself."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdxl_worker.assets.folder import temporary_file
from sdxl_worker.background import in_background
from sdxl_worker.errors import WorkerError
from sdxl_worker.generate.batches import MIN_FREE_BYTES
from sdxl_worker.generate.infotext import model_name
from sdxl_worker.generate.modes import plain_inputs
from sdxl_worker.generate.refiner import Refiner
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.serving.upload import bucket_is_configured, try_upload
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

Drawing = Callable[[], AbstractContextManager[None]]
PROBE = GenerationRequest(
    prompt="a test", width=64, height=64, num_inference_steps=1, scheduler="K_EULER", strength=1.0
)
_VERSIONS = ("runpod", "torch", "diffusers", "transformers")


class UnhealthyWorker(Exception):
    """This worker cannot do its job; the sentence says what to change."""


def checks(
    settings: Settings,
    pipeline: Callable[[], Any],
    refiner: Callable[[], Refiner | None],
    drawing: Drawing = contextlib.nullcontext,
) -> list[functools.partial[None]]:
    """What has to pass, in this order; `pipeline` gives the resident one or raises ModelUnavailable, `refiner` what was
    loaded with it, and `drawing` is entered around what draws."""
    return [
        functools.partial(check_model, pipeline, drawing),
        functools.partial(check_refiner, pipeline, refiner, drawing),
        functools.partial(check_cache_folder, settings.lora_cache_dir),
        functools.partial(check_gpu_memory, pipeline),
        functools.partial(check_bucket, settings),
    ]


def check_model(pipeline: Callable[[], Any], drawing: Drawing = contextlib.nullcontext) -> None:
    """The base model loads and renders; raises UnhealthyWorker. A model that is not numbers renders one colour."""
    try:
        resident = pipeline()
        inputs = plain_inputs(resident, PROBE.width, PROBE.height)
        picture = _drawn(lambda: render(resident, PROBE, inputs=inputs), drawing)
    except (WorkerError, RuntimeError) as error:
        raise UnhealthyWorker(f"{error}. Change MODEL_ID or VAE_ID, or choose a larger GPU") from error
    if _is_empty(picture):
        raise UnhealthyWorker("the base model renders an empty picture: change MODEL_ID or VAE_ID")


def _drawn(draw: Callable[[], list[Image.Image]], drawing: Drawing) -> Image.Image:
    """The only picture of `draw`, in a thread that ends with it.

    On a CPU each thread that draws gets OpenMP threads of its own: with those of the main thread, which draws nothing
    later, there would be more than cores, and jobs would take twice as long.
    """

    def drawn() -> Image.Image:
        with drawing():
            (picture,) = draw()
        return picture

    return in_background(drawn, "fitness").result()


def _is_empty(picture: Image.Image) -> bool:
    return len(picture.getcolors(PROBE.width * PROBE.height) or ()) == 1


def check_refiner(
    pipeline: Callable[[], Any], refiner: Callable[[], Refiner | None], drawing: Drawing = contextlib.nullcontext
) -> None:
    """The refiner renders, where there is one; raises UnhealthyWorker."""
    resident, loaded = pipeline(), refiner()
    if loaded is None:
        return
    # With a picture to start from it draws alone.
    start = {"image_url": Image.linear_gradient("L").convert("RGB").resize((PROBE.width, PROBE.height))}
    probe = dataclasses.replace(
        PROBE, image_url="a picture", refiner=loaded.name, refiner_inference_steps=2, strength=0.5
    )
    try:
        refining = loaded.ready_for(probe)
        picture = _drawn(lambda: render(resident, probe, inputs=start, refining=refining), drawing)
    except (WorkerError, RuntimeError, ValueError) as error:
        raise UnhealthyWorker(f"the refiner: {error}. Change REFINER_ID, or choose a larger GPU") from error
    if _is_empty(picture):
        raise UnhealthyWorker("the refiner renders an empty picture: change REFINER_ID")


def check_cache_folder(folder: Path) -> None:
    """A file can be written and renamed where LoRAs are kept; raises UnhealthyWorker.

    A volume that is merely full is only logged: what is cached still works, and new LoRAs go to temporary space.
    """
    try:
        with temporary_file(folder, "health-check") as (path, handle):
            handle.write(b"1")
            path.replace(path.with_suffix(".renamed"))
            path.with_suffix(".renamed").unlink()
    except (OSError, WorkerError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            logger.warning("the LoRA cache folder %s is full: set LORA_CACHE_MAX_GB or free space", folder)
            return
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise UnhealthyWorker(
            f"the LoRA cache folder {folder} cannot be written ({reason}): "
            "attach a network volume, or set LORA_CACHE_DIR to a folder that can"
        ) from error


def check_gpu_memory(pipeline: Callable[[], Any]) -> None:
    """What is free beside the resident model holds one picture; raises UnhealthyWorker. Nothing to say on a CPU."""
    device = pipeline().device
    if device.type != "cuda":
        return
    # What the probe left in PyTorch's cache is free for the next picture.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if free < MIN_FREE_BYTES:
        raise UnhealthyWorker(
            f"only {free / 2**30:.1f} of {total / 2**30:.1f} GB of GPU memory are free beside the model, and a picture "
            f"needs {MIN_FREE_BYTES / 2**30:.0f}: choose a GPU type with more memory"
        )


def check_bucket(settings: Settings) -> None:
    """A picture can be put into the bucket, if one is set; raises UnhealthyWorker."""
    try:
        if bucket_is_configured(settings):
            try_upload()
    except WorkerError as error:
        raise UnhealthyWorker(str(error)) from error


def startup_line(settings: Settings) -> str:
    """One line: versions, device, model, refiner, cache folder and the space left in it."""
    refiner = f"refiner {model_name(settings.refiner_id)}; " if settings.refiner_id else ""
    versions = " ".join(f"{name} {_version(name)}" for name in _VERSIONS)
    return (
        f"worker: python {platform.python_version()} {versions}; device {_device()}; "
        f"model {model_name(settings.model_id)}; {refiner}"
        f"LoRA cache {settings.lora_cache_dir} ({_space(settings.lora_cache_dir)})"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    _, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()} {total / 2**30:.0f} GB"


def _space(folder: Path) -> str:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return f"{shutil.disk_usage(existing).free / 2**30:.1f} GB free"
