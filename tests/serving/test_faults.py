"""What library exceptions mean for the job and for the process."""

import contextlib
import gc
import weakref

import pytest
import torch

from sdxl_worker.errors import DeviceFailed, NotFound, OutOfMemory, RestoreFailed, WorkerError
from sdxl_worker.serving import faults
from sdxl_worker.serving.faults import Health, as_worker_error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_row_49_out_of_memory(error):
    failure = as_worker_error(error)
    assert type(failure) is OutOfMemory
    assert not failure.refresh_worker


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_row_50_other_cuda_errors(error):
    failure = as_worker_error(error)
    assert type(failure) is DeviceFailed
    assert failure.refresh_worker
    assert "CUDA" not in str(failure)


def test_our_own_errors_pass_and_unknown_ones_show_nothing():
    own = NotFound("x")
    assert as_worker_error(own) is own
    unknown = as_worker_error(KeyError("/secret/path"))
    assert (type(unknown), unknown.code) == (WorkerError, "INTERNAL")
    assert "secret" not in str(unknown)


def out_of_memory(health: Health, error: Exception) -> bool:
    """Whether a picture that does not fit asks for a fresh worker."""
    with pytest.raises(OutOfMemory) as caught, health.watch(), health.rendering():
        raise error
    return caught.value.refresh_worker


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory("too large")])
def test_memory_runs_out_twice_in_a_row_before_a_fresh_worker_is_asked_for(error):
    health = Health()
    assert not out_of_memory(health, error)
    with health.watch(), health.rendering():
        pass
    assert not out_of_memory(health, error)
    with pytest.raises(MemoryError), health.watch():
        raise MemoryError  # while a LoRA is merged: not the picture's doing
    assert out_of_memory(health, error)
    with health.watch():
        pass
    assert not OutOfMemory.refresh_worker


@pytest.mark.parametrize("error", [DeviceFailed("broken"), RestoreFailed("broken"), RuntimeError("CUDA error: 700")])
def test_after_a_fatal_error_the_device_is_refused(error):
    health = Health()
    with pytest.raises(NotFound), health.watch():
        raise NotFound("x")
    with pytest.raises(type(error)), health.watch():
        raise error
    assert health.is_lost
    with pytest.raises(type(as_worker_error(error))), health.watch():
        pytest.fail("the device was used")


def test_nothing_is_given_back_to_a_lost_device(monkeypatch):
    """CUDA raises where that is tried, and ends the process over page-locked memory."""
    monkeypatch.setattr(faults, "free_memory", lambda _: pytest.fail("memory was given back"))
    health, held = Health(), []

    def render() -> None:
        weights = torch.zeros(1)
        held.append(weakref.ref(weights))
        raise RuntimeError("CUDA error: device-side assert triggered")

    with contextlib.suppress(RuntimeError), health.watch():
        render()
    gc.collect()
    assert held[0]() is not None


def test_what_a_failed_job_held_is_free_before_the_device_is_passed_on():
    held = []

    class Latents:
        """Stands for a tensor."""

    def render() -> None:
        latents = Latents()
        held.append(weakref.ref(latents))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            restore(latents)

    def restore(weights: object) -> None:
        raise OutOfMemory("again")

    caught = None
    try:
        with Health().watch():
            render()
    except OutOfMemory as error:
        caught = error
        assert held[0]() is None
    assert caught is not None
