"""COMPILE=1: the UNet's transformer blocks and, on a GPU, the VAE's up blocks as compiled code, in channels_last.

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
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# Width and height, unequal: on a GPU near those that are asked for most, since kernels are tuned for the first.
_GPU_SIZE, _CPU_SIZE = (896, 1152), (320, 384)


def compile_in_place(pipeline: StableDiffusionXLPipeline, backend: str | Callable[..., Any] = "inductor") -> None:
    """Lay out UNet and VAE in channels_last and have their blocks compiled when they are first called.

    Before anything else takes the weights' layout for granted. `backend` is torch.compile's.
    """
    for model in (pipeline.unet, pipeline.vae):
        model.to(memory_format=torch.channels_last)
    blocks = list(_blocks(pipeline))
    fallback = _Fallback(blocks)
    for block in blocks:
        # The forward method and not the module's call: that is the same function for all modules, and torch keeps a
        # few graphs for each function.
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)
        block._compiled_call_impl = fallback.around(block, compiled)


def is_compiled(pipeline: StableDiffusionXLPipeline) -> bool:
    """False also after something could not be compiled."""
    return any(block._compiled_call_impl is not None for block in _blocks(pipeline))


def warm_up(pipeline: StableDiffusionXLPipeline) -> None:
    """Draw what has every form of every block compiled; the log says how far it is. Whatever fails is only logged."""
    started = time.monotonic()
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


def _blocks(pipeline: StableDiffusionXLPipeline) -> Iterator[nn.Module]:
    repeated = pipeline.unet._repeated_blocks
    yield from (module for module in pipeline.unet.modules() if type(module).__name__ in repeated)
    if pipeline.device.type == "cuda":
        # torch compiles a convolution for the CPU once for small pictures and once for large ones.
        yield from pipeline.vae.decoder.up_blocks


class _Fallback:
    """What happens to a call of compiled code that fails: no job is lost where the code as written can do it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._has_own_folder = False

    def around(self, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, with `block` as it was written where that cannot be compiled."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if not _is_of_the_compiler(error) or is_out_of_memory(error):
                    raise
                again = self._next_try(error)
            # Outside of the handler: the error's frames hold tensors.
            return compiled(*args, **kwargs) if again else block._call_impl(*args, **kwargs)

        return call

    def _next_try(self, error: Exception) -> bool:
        """True to try once more, elsewhere on the disk; else all blocks, or this call alone, go on as written."""
        if type(error).__name__ == "FailOnRecompileLimitHit":
            # A shape of its own, which a ninth graph would serve: the others stay compiled.
            logger.debug("COMPILE: not compiled: %s", error)
            return False
        if not self._has_own_folder and _is_of_the_disk(error):
            self._has_own_folder = True
            folder = tempfile.mkdtemp(prefix="compiled-")
            os.environ |= dict.fromkeys(CACHE_VARIABLES, folder)
            logger.warning("COMPILE_CACHE_DIR cannot be used (%s): compiled code is kept in %s", _reason(error), folder)
            return True
        for block in self._blocks:
            block._compiled_call_impl = None
        logger.warning("COMPILE is 1, and the model cannot be compiled here (%s): it runs as it is", _reason(error))
        return False


def _is_of_the_compiler(error: BaseException) -> bool:
    where = type(error).__module__
    if where.startswith(_COMPILERS):
        return True
    # Triton builds its launchers at the first call, with the C compiler.
    return "C compiler" in str(error) or "Python.h" in str(error)


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
