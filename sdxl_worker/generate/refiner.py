"""The SDXL refiner: loaded beside the base model, whose text encoder 2 and VAE it uses, and its pass over a picture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_worker import prompts
from sdxl_worker.errors import AssetFileError, ModelUnavailable
from sdxl_worker.generate.base_model import BaseModel, find_refiner
from sdxl_worker.generate.batches import MIN_FREE_BYTES
from sdxl_worker.generate.checkpoint_facts import NOT_A_CHECKPOINT, REFINER, read_checkpoint
from sdxl_worker.generate.infotext import model_name
from sdxl_worker.generate.load import cannot_be_loaded, pipeline_from, reading
from sdxl_worker.generate.model_hash import start_hashing
from sdxl_worker.generate.modes import Inputs, Pass, fitted
from sdxl_worker.generate.tiny_refiner import build_refiner
from sdxl_worker.lora.merge import ACTIVATION_RESERVE
from sdxl_worker.memory import free_bytes
from sdxl_worker.request import GenerationRequest
from sdxl_worker.request.refinement import Refinement, refinement_of
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refiner:
    """A resident refiner. Only its UNet is its own; where `waits_in_host_memory`, that is on the device for its turns.

    `name` is safe to show; `hash` is that of `generate.model_hash`.
    """

    pipeline: StableDiffusionXLImg2ImgPipeline
    name: str
    hash: Future[str]
    waits_in_host_memory: bool = False

    @property
    def title(self) -> str:
        """Name and hash, as A1111 writes a checkpoint's; waits for the hash."""
        found = self.hash.result()
        return f"{self.name} [{found}]" if found else self.name

    def ready_for(
        self, request: GenerationRequest, embeddings: prompts.Embeddings = prompts.NO_EMBEDDINGS
    ) -> Refining | None:
        """The refiner's part of `request`, None where it has none.

        To be asked for while no LoRA is merged: none is meant for the refiner, whose text encoder is the base model's.
        Raises InvalidRequest.
        """
        plan = refinement_of(request)
        return None if plan is None else Refining(self, plan, prompts.encoded_now(self.pipeline, request, embeddings))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the UNet on the device; afterwards, whatever happens, it is where it waits, with nothing copied back."""
        if not self.waits_in_host_memory:
            yield
            return
        unet = self.pipeline.unet
        waiting = [(tensor, tensor.data) for tensor in (*unet.parameters(), *unet.buffers())]
        try:
            for tensor, data in waiting:
                tensor.data = data.to(self.pipeline.vae.device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, data in waiting:
                tensor.data = data


@dataclass(frozen=True)
class Refining:
    """The refiner's part of one request."""

    refiner: Refiner
    plan: Refinement
    conditioning: prompts.Conditioning

    def passes(self, before: Sequence[Pass], request: GenerationRequest, inputs: Inputs) -> list[Pass]:
        """`before`, the base model's passes, up to the latents that the refiner goes on with, and the refiner's."""
        if self.plan.is_alone:
            return [self._own_pass({"image": fitted(inputs["image_url"], request)})]
        *first, last = before
        return [*first, last.giving_latents(self.plan.switch_at), self._own_pass({}, lambda latents: latents)]

    def _own_pass(self, picture: dict[str, Any], image: Callable[[torch.Tensor], Any] | None = None) -> Pass:
        plan = self.plan
        how = {"denoising_start": plan.switch_at} if plan.strength is None else {"strength": plan.strength}
        return Pass(
            self.refiner.pipeline,
            {"num_inference_steps": plan.steps, **how, **picture},
            image,
            conditioning=self.conditioning,
            around=self.refiner.turn,
            device_bytes=size_of(self.refiner.pipeline.unet) if self.refiner.waits_in_host_memory else 0,
            has_loras=False,
            goes_on=plan.strength is None,
        )


def load_refiner(settings: Settings, base: StableDiffusionXLPipeline) -> Refiner | None:
    """The refiner of REFINER_ID beside `base`, None when it is empty; the log says where its weights are.

    Raises ModelUnavailable, also where a picture would have no room beside the weights.
    """
    model = find_refiner(settings)
    if model is None:
        return None
    pipeline = build_refiner(base) if model.kind == "tiny" else _from_disk(model, base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval().requires_grad_(False)
    # Copied now: no render may use the originals meanwhile.
    prompts.tokenizers_of(pipeline)
    waits = _waits_in_host_memory(model.name, pipeline.unet, base.device)
    return Refiner(pipeline, model_name(settings.refiner_id), start_hashing(model, pipeline), waits)


def _from_disk(model: BaseModel, base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    shared = {"vae": base.vae, "text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2}
    none = {"text_encoder": None, "tokenizer": None}
    if model.kind == "file" and model.path is not None:
        _check_header(model, model.path)
    with reading(model, "REFINER_ID", "refiner"):
        pipeline = pipeline_from(StableDiffusionXLImg2ImgPipeline, model, base.unet.dtype, "cpu", **shared, **none)
    wants, gets = pipeline.unet.config.cross_attention_dim, base.text_encoder_2.config.hidden_size
    if wants != gets:
        raise ModelUnavailable(
            f"{model.name} is not an SDXL refiner: its UNet reads text states of width {wants}, and the second text "
            f"encoder gives {gets}; check REFINER_ID"
        )
    return pipeline


def _check_header(model: BaseModel, path: Path) -> None:
    try:
        family = read_checkpoint(path).model
    except AssetFileError as error:
        raise cannot_be_loaded(model, f"{error}; check REFINER_ID", "refiner") from None
    if family not in (REFINER, NOT_A_CHECKPOINT):
        raise ModelUnavailable(
            f"the refiner {model.name} is a checkpoint of {family}, not an SDXL refiner; check REFINER_ID"
        )


def _waits_in_host_memory(name: str, unet: torch.nn.Module, device: torch.device) -> bool:
    """Put the UNet on the device where it leaves room, else into page-locked host memory; True for the latter.

    Raises ModelUnavailable where it has no room even for its turn.
    """
    size = size_of(unet)
    free = room_on(device)
    left = None if free is None else free - size
    if left is not None and left < MIN_FREE_BYTES:
        raise ModelUnavailable(
            f"the refiner {name} takes {size / 2**30:.1f} GB and a picture {MIN_FREE_BYTES / 2**30:.0f} GB, and only "
            f"{(left + size) / 2**30:.1f} GB are free beside the base model; "
            "take a larger GPU, or set REFINER_ID to empty"
        )
    waits = left is not None and left < ACTIVATION_RESERVE
    if waits:
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.data = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
    else:
        unet.to(device)
    where = "page-locked host memory, and is moved for its turn" if waits else f"{device.type} memory"
    room = "" if free is None else f": {free / 2**30:.1f} GB were free beside the base model"
    logger.info("refiner %s: its UNet of %.1f GB is in %s%s", name, size / 2**30, where, room)
    return waits


def room_on(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where it has no memory of its own."""
    return free_bytes(device) if device.type == "cuda" else None


def size_of(module: torch.nn.Module) -> int:
    """Bytes of its weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
