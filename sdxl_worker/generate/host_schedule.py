"""The noise schedule of a run stays with the CPU, so that no step waits for the device.

diffusers puts the timesteps on the device, where half of the samplers look them up in a table in host memory, compare
them, or search for them: each time the CPU waits until the device has done all that was asked of it. With timesteps in
host memory all of that is plain arithmetic, and what a kernel has to know goes to the device through page-locked
memory, in the stream's own order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from sdxl_worker.transfers import sent

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@contextlib.contextmanager
def on_host(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Inside, the scheduler that the pipeline has now keeps its timesteps on the CPU, and the UNet gets them in time.

    On the CPU there is nothing to change.
    """
    if pipeline.device.type == "cpu":
        yield
        return
    scheduler: Any = pipeline.scheduler
    changed = {
        "set_timesteps": _for_the_cpu(scheduler.set_timesteps),
        "step": _without_waiting(scheduler.step),
        "add_noise": _without_waiting(scheduler.add_noise),
    }
    for name, method in changed.items():
        setattr(scheduler, name, method)
    hook = pipeline.unet.register_forward_pre_hook(_with_timestep_there)
    try:
        yield
    finally:
        hook.remove()
        # Its own methods again, without a cycle that would keep past model outputs on the device.
        for name in changed:
            delattr(scheduler, name)


def _for_the_cpu(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_timesteps)
    def on_cpu(num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
        steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        set_timesteps(**steps, **options, device="cpu")

    return on_cpu


def _without_waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def ahead(*arguments: Any, **options: Any) -> Any:
        with WithoutWaiting():
            return method(*arguments, **options)

    return ahead


def _with_timestep_there(_unet: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The UNet's arguments (sample, timestep, ...) with a timestep that is on the sample's device."""
    sample, timestep, *rest = arguments
    return sample, sent(timestep, sample.device), *rest


class WithoutWaiting(TorchFunctionMode):
    """Inside, values that the CPU has go to the device without waiting, and no result is waited for to be checked.

    Covers what diffusers' schedulers do: `tensor.to(device)`, `tensor[[0, 0]]` and `torch.linalg.solve`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            device = _device_in((*args[1:], *options.values()))
            if device is not None and device.type != "cpu":
                dtype = next(
                    (value for value in (*args[1:], *options.values()) if isinstance(value, torch.dtype)), None
                )
                return sent(args[0], device, dtype)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list) and args[0].device.type != "cpu":
            return args[0][sent(torch.tensor(args[1]), args[0].device)]
        if func is torch.linalg.solve:
            # The one with the check asks the device whether the matrix was singular.
            return torch.linalg.solve_ex(*args, **options)[0]
        return func(*args, **options)


def _device_in(values: tuple[Any, ...]) -> torch.device | None:
    return next((torch.device(value) for value in values if isinstance(value, (str, torch.device))), None)
