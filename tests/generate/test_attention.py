"""ATTENTION: the kernel that is asked for draws, and one that is not there is named and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from sdxl_worker.generate import attention
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.support.operations import Operations

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def test_a_kernel_that_the_device_lacks_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert attention.usable("cudnn", CPU, torch.float32) == ""
    assert "ATTENTION is cudnn" in caplog.text
    assert attention.usable("math", CPU, torch.float32) == "math"
    assert attention.usable("", CPU, torch.float32) == ""


def test_the_choice_ends_with_the_drawing() -> None:
    before = set(_cur_sdpa_kernel_backends())
    with attention.chosen("math"):
        chosen = set(_cur_sdpa_kernel_backends())
        assert SDPBackend.MATH in chosen
        assert SDPBackend.FLASH_ATTENTION not in chosen
    assert set(_cur_sdpa_kernel_backends()) == before


@pytest.mark.parametrize("kernel", ["", "flash", "math"])
def test_a_job_and_the_check_before_are_drawn_by_the_kernel(kernel: str, tmp_path: Path) -> None:
    """The CPU has flash, which torch takes by itself, and the formula written out, which is no operation of its own."""
    worker = Worker(Settings(model_id="tiny", attention=kernel, lora_cache_dir=tmp_path))
    unet, counted = worker.pipeline.unet, Operations()
    forward = unet.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with counted:
            return forward(*args, **kwargs)

    unet.forward = watched
    answer = worker.run({"input": {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1, "seed": 1}})
    assert "images" in answer, answer
    assert drawn_by_the_formula(counted) is (kernel == "math")
    counted.names.clear()
    check_model, *_ = worker.checks()
    check_model()
    assert drawn_by_the_formula(counted) is (kernel == "math")


def drawn_by_the_formula(counted: Operations) -> bool:
    """Or by flash; never by both."""
    by_formula = bool(counted.names["_softmax"] + counted.names["_safe_softmax"])
    assert bool(counted.names[FLASH]) is not by_formula
    return by_formula
