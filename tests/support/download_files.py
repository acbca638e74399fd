"""Small real LoRA files, and the settings that downloads are tested with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sdxl_worker.settings import Settings

UNET = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn2_to_k"


def lora_bytes(seed: int = 0, *, megabytes: float = 0.0, modules: int = 2) -> bytes:
    """An SDXL LoRA in kohya naming, of about `megabytes`; another `seed` gives other bytes."""
    generator = np.random.default_rng(seed)
    rank = max(2, round(megabytes * 1e6 / modules / 2 / (2048 + 640)))
    tensors = {}
    for index in range(modules):
        name = UNET.format(index)
        tensors[f"{name}.lora_down.weight"] = _noise(generator, rank, 2048)
        tensors[f"{name}.lora_up.weight"] = _noise(generator, 640, rank)
        tensors[f"{name}.alpha"] = np.array(float(rank), np.float32)
    return save(tensors, {"ss_base_model_version": "sdxl_base_v1-0"})


def _noise(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.integers(-100, 100, shape, np.int8).astype(np.float16) / 4096


def settings_for(folder: Path, **changes: Any) -> Settings:
    """Settings whose cache is `folder`, and whose downloads end soon."""
    return Settings(**{"lora_cache_dir": folder, "download_timeout": 600.0, **changes})


def published(folder: Path) -> list[str]:
    """The names of the LoRA files in the cache."""
    return sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".pt", ".bin"))


def partials(folder: Path) -> list[str]:
    """The names of the temporary files in the cache."""
    return sorted(path.name for path in (folder / ".partial").glob("*"))


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll `condition` until it holds; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)
