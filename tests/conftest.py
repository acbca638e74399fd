"""Shared fixtures: one tiny SDXL per test session, and a fresh one for tests that change it."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports the Hub client: no test may reach for the internet.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

from sdxl_worker import topology
from sdxl_worker.lora.engine import LoraEngine

torch.set_num_threads(1)


# Files with few tests that take longest, by far.
SLOW = (
    "tests/integration/test_job_loop.py",
    "tests/generate/test_compiled.py",
    "tests/integration/test_fleet.py",
    "tests/soak/",
    "tests/hostile/",
    "tests/gpu/",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files go to xdist's processes in the order below: by itself it would keep those with few tests for the end."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that processes side by side end together; GPU tests skip where there is none."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def _resident():
    pipeline = topology.build_sdxl()
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline, LoraEngine(pipeline, 2**30)


@pytest.fixture
def pipeline(_resident):
    """The session's tiny SDXL, float32 on the CPU; tests put back what they change."""
    return _resident[0]


@pytest.fixture
def engine(_resident) -> Iterator[LoraEngine]:
    """The tiny SDXL's LoRA engine, with nothing applied before and after."""
    yield _resident[1]
    _resident[1].restore()
