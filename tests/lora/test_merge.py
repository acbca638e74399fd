"""Merging into weights in place: against the formula in float64, in both memory orders of a convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.lora.merge import Target, WeightMerger
from tests.support.operations import Operations

TARGET = Target("unet", "conv", "weight")
ORDERS = (torch.contiguous_format, torch.channels_last)
CPU_AND_GPU = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def convolution(order: torch.memory_format, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    weight = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    return weight.to(device, dtype).contiguous(memory_format=order)


def loras(device: str = "cpu") -> list[tuple[LowRank, float]]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            LowRank(
                torch.randn(24, rank, generator=random).to(device),
                torch.randn(rank, 16 * 9, generator=random).to(device),
                factor,
            ),
            scale,
        )
        for rank, factor, scale in ((4, 0.5, 0.8), (7, 1.0, -0.3))
    ]


def formula(weight: Tensor, parts: list[tuple[LowRank, float]]) -> Tensor:
    change = sum(scale * part.factor * (part.up.double() @ part.down.double()) for part, scale in parts)
    assert isinstance(change, Tensor)
    return weight.double() + change.reshape(weight.shape)


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_merged_weights_are_the_formula_rounded_and_restored_ones_the_bits_of_before(order, dtype, count, device):
    live, parts = convolution(order, dtype, device), loras(device)[:count]
    before, strides, address = live.clone(), live.stride(), live.data_ptr()
    expected = formula(live, parts)
    merger = WeightMerger({TARGET: live})

    merger.update({TARGET: parts})

    # One step of the dtype at each value, and what float32 rounds off sums of this size.
    off = torch.finfo(dtype).eps * expected.abs() + 1e-5
    assert bool(((live.double() - expected).abs() <= off).all())
    assert (live.stride(), live.data_ptr()) == (strides, address)
    merger.restore()
    assert torch.equal(live, before)
    assert (live.stride(), live.data_ptr()) == (strides, address)


@pytest.mark.parametrize("count", [1, 2])
def test_a_channels_last_convolution_is_merged_by_the_same_operations(count):
    """Its own few more are views and one copy of the small factor: none is of the weight's size."""
    calls = []
    for order in ORDERS:
        live = convolution(order)
        merger = WeightMerger({TARGET: live})
        merger.reserve([TARGET])
        with Operations() as counted:
            merger.update({TARGET: loras()[:count]})
        calls.append(counted)
    plain, channels_last = calls
    assert plain.names["addmm"] == channels_last.names["addmm"] == 1
    for name in ("clone", "copy_", "_to_copy", "add_", "mul", "mm"):
        assert channels_last.elements[name] - plain.elements[name] <= (4 + 7) * 16 * 9, name
    assert channels_last.names["mm"] == 0


def test_what_torch_keeps_free_is_room_for_the_pristine_copies(monkeypatch: pytest.MonkeyPatch):
    """After a picture most of a GPU's free memory is in torch's pool: the copies would stay in host memory for good."""
    gigabyte = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabyte, 24 * gigabyte))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 8 * gigabyte)

    class OnGpu:
        """Says that it is on a GPU."""

        device, is_cuda = torch.device("cuda"), True

    merger = WeightMerger({TARGET: convolution(torch.contiguous_format)})
    assert merger._choose_place(OnGpu()) == "device"  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 16 * gigabyte)
    assert merger._choose_place(OnGpu()) == "host"  # type: ignore[arg-type]
