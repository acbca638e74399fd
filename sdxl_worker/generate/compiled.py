"""COMPILE=1: compiled code for the UNet's transformer blocks and, on a GPU, its ResNet blocks and the VAE's up blocks.

Weights are laid out in channels_last.

Block by block ("regional"), so that one graph serves all blocks of a width, and in place: module names, the state dict
and the storages stay, so that LoRAs, other pipelines on the same components and hooks find what they know. Weights are
inputs of the compiled code, so it follows what is merged into them.

Shapes are dynamic. The first shapes that a block meets still matter: torch takes two sides that are equal then for
equal always, and a size of 1 for 1 always. The warm-up draws pictures that are not square, two at once with guidance
and one without.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdxl_worker.generate.modes import plain_inputs
from sdxl_worker.generate.render import render
from sdxl_worker.memory import is_out_of_memory
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)

# Where errors come from that say that something cannot be compiled, and nothing about the picture.
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "triton")
_TOOL_ERRORS = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# Of one function, where torch allows eight. SDXL's ResNet blocks have twelve pairs of widths, each for several pictures
# and for one.
_MOST_GRAPHS = 64
# Width and height, unequal: on a GPU near those that are asked for most, since kernels are tuned for the first.
_GPU_SIZE, _CPU_SIZE = (896, 1152), (320, 384)


def compile_in_place(
    pipeline: StableDiffusionXLPipeline,
    backend: str | Callable[..., Any] = "inductor",
    *,
    kernel: str = "",
    gpu: bool | None = None,
) -> None:
    """Lay out UNet and VAE in channels_last and have their blocks compiled when they are first called.

    Before anything else takes the weights' layout for granted. `backend` is torch.compile's. `kernel` is the one of
    ATTENTION: it becomes part of the code, and torch's cache does not tell code for one from code for another. `gpu`
    says whether the blocks are those of a GPU (default: where the pipeline is on one).
    """
    for model in (pipeline.unet, pipeline.vae):
        model.to(memory_format=torch.channels_last)
    blocks = list(_blocks(pipeline, pipeline.device.type == "cuda" if gpu is None else gpu))
    fallback = _Fallback(blocks)
    if kernel:
        backend = _tagged(backend, f"attention {kernel}")
    for block in blocks:
        # The forward method and not the module's call: that is the same function for all modules, and torch keeps a
        # few graphs for each function.
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)
        block._compiled_call_impl = fallback.around(block, compiled)


def _tagged(backend: str | Callable[..., Any], tag: str) -> Callable[..., Any]:
    """The backend, for which torch's caches have entries of their own."""
    config: Any = torch.compiler.config
    compile_graph = torch._dynamo.lookup_backend(backend)

    def tagged(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        # Here, since torch's settings hold for one thread.
        with config.patch(cache_key_tag=tag):
            return compile_graph(graph, inputs, **options)

    return tagged


def is_compiled(pipeline: StableDiffusionXLPipeline) -> bool:
    """False also after something could not be compiled."""
    return any(module._compiled_call_impl is not None for module in pipeline.unet.modules())


def warm_up(pipeline: StableDiffusionXLPipeline) -> None:
    """Draw what has every form of every block compiled; the log says how far it is. Whatever fails is only logged."""
    started = time.monotonic()
    _allow_more_graphs()
    width, height = _GPU_SIZE if pipeline.device.type == "cuda" else _CPU_SIZE
    inputs = plain_inputs(pipeline, width, height)
    forms = (("several pictures, with guidance", 2, 5.5), ("one picture, without guidance", 1, 1.0))
    for number, (name, pictures, guidance) in enumerate(forms, 1):
        logger.info("COMPILE: compiling %d of %d (%s)", number, len(forms), name)
        request = GenerationRequest(
            prompt="a lighthouse",
            width=width,
            height=height,
            num_inference_steps=1,
            num_images=pictures,
            guidance_scale=guidance,
            scheduler="K_EULER",
            strength=1.0,
            seed=0,
        )
        try:
            # Compilers may draw random numbers of their own.
            with torch.random.fork_rng(devices=[pipeline.device] if pipeline.device.type == "cuda" else []):
                render(pipeline, request, inputs=inputs)
        except Exception as error:
            logger.warning("COMPILE: the warm-up failed (%s); the first jobs compile what they need", error)
            return
    folder = os.environ.get(CACHE_VARIABLES[0], "torch's own folder")
    state = "ready" if is_compiled(pipeline) else "given up"
    logger.info("COMPILE: %s after %.0f s; compiled code is kept in %s", state, time.monotonic() - started, folder)


def _allow_more_graphs() -> bool:
    """False where that was done: for this thread alone, as torch's settings are. Jobs may run in another one."""
    allowed = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(allowed, _MOST_GRAPHS)
    return allowed < _MOST_GRAPHS


def _blocks(pipeline: StableDiffusionXLPipeline, gpu: bool) -> Iterator[nn.Module]:
    # Beside what diffusers says to be repeated, on a GPU what takes most of the rest of the time. torch compiles a
    # convolution for the CPU once for small pictures and once for large ones.
    kinds = (*pipeline.unet._repeated_blocks, *(("ResnetBlock2D",) if gpu else ()))
    yield from (module for module in pipeline.unet.modules() if type(module).__name__ in kinds)
    if gpu:
        yield from pipeline.vae.decoder.up_blocks


class _Fallback:
    """What happens to a call of compiled code that fails: no job is lost where the code as written can do it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._has_own_folder = self._has_met_the_limit = False

    def around(self, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, with `block` as it was written where that cannot be compiled."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*map(_no_view, args), **{name: _no_view(value) for name, value in kwargs.items()})
            except Exception as error:
                if not _is_of_the_compiler(error) or is_out_of_memory(error):
                    raise
                again = self._next_try(block, error)
            # Outside of the handler: the error's frames hold tensors.
            return call(*args, **kwargs) if again else block._call_impl(*args, **kwargs)

        return call

    def _next_try(self, block: nn.Module, error: Exception) -> bool:
        """True to try once more, which can go well now; else that class of blocks, or this call, goes on as written."""
        if type(error).__name__ == "FailOnRecompileLimitHit":
            if _allow_more_graphs():
                return True
            # A shape of its own, which one more graph would serve: the others stay compiled.
            if not self._has_met_the_limit:
                logger.warning("COMPILE: too many forms of %s are compiled: new ones run as written", _name(block))
            self._has_met_the_limit = True
            return False
        if not self._has_own_folder and _is_of_the_disk(error):
            self._has_own_folder = True
            folder = tempfile.mkdtemp(prefix="compiled-")
            os.environ |= dict.fromkeys(CACHE_VARIABLES, folder)
            logger.warning("COMPILE_CACHE_DIR cannot be used (%s): compiled code is kept in %s", _reason(error), folder)
            return True
        # Without a compiler nothing can be; what else is wrong with one class need not be with the next.
        failing = [other for other in self._blocks if _is_of_the_tools(error) or _name(other) == _name(block)]
        for other in failing:
            other._compiled_call_impl = None
        left = "" if len(failing) == len(self._blocks) else f"'s {_name(block)}"
        reason = _reason(error)
        logger.warning("COMPILE is 1, and the model%s cannot be compiled here (%s): it runs as it is", left, reason)
        return False


def _no_view(value: Any) -> Any:
    """The same, but for a view a tensor of its own on the same memory: torch compiles code of their own for views."""
    return value.detach() if isinstance(value, torch.Tensor) and value._is_view() else value


def _name(block: nn.Module) -> str:
    return type(block).__name__


def _is_of_the_compiler(error: BaseException) -> bool:
    return type(error).__module__.startswith(_COMPILERS) or _is_of_the_tools(error)


def _is_of_the_tools(error: BaseException) -> bool:
    """No compiler, or one that fails. Triton builds its launchers at the first call, with the C compiler."""
    for link in _links(error):
        if isinstance(link, subprocess.CalledProcessError) or type(link).__name__ in _TOOL_ERRORS:
            return True
        if "C compiler" in str(link):
            return True
    return False


def _is_of_the_disk(error: BaseException | None) -> bool:
    return any(isinstance(link, OSError) for link in _links(error))


def _links(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    *_, last = _links(error)
    return f"{type(last).__name__}: {str(last).strip().partition(chr(10))[0][:200]}"
