"""ATTENTION: which of torch's attention kernels draws, where it can."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

KERNELS: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
)
# Width of a head of SDXL's UNet, tokens of a prompt.
_HEAD, _TOKENS = 64, 77


def usable(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """`kernel` itself, or the empty string (torch chooses) with a warning in the log where this device has no such one.

    Tried on the attention from a picture of 64 places to a prompt.
    """
    if not kernel:
        return ""
    query = torch.zeros(2, 1, 64, _HEAD, device=device, dtype=dtype)
    key = torch.zeros(2, 1, _TOKENS, _HEAD, device=device, dtype=dtype)
    try:
        with sdpa_kernel(KERNELS[kernel]):
            torch.nn.functional.scaled_dot_product_attention(query, key, key)
    except RuntimeError:
        name = str(dtype).removeprefix("torch.")
        logger.warning("ATTENTION is %s, which this %s has not for %s: torch chooses", kernel, device.type, name)
        return ""
    return kernel


@contextlib.contextmanager
def chosen(kernel: str) -> Iterator[None]:
    """Inside, attention takes `kernel` wherever it knows the shapes; the VAE's heads of 512 are too wide for some.

    For the whole process, and put back on the way out. Empty: torch chooses.
    """
    if not kernel:
        yield
        return
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([KERNELS[kernel], *others], set_priority=True):
        yield
