"""ATTENTION: the kernel that is asked for draws, and one that is not there is named and left out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from sdxl_worker.generate import attention

CPU = torch.device("cpu")


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
