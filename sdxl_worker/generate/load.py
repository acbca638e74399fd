"""Load the resident SDXL pipeline."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from sdxl_worker import topology
from sdxl_worker.errors import AssetFileError, ModelUnavailable
from sdxl_worker.generate.base_model import BaseModel, find_base_model
from sdxl_worker.generate.checkpoint_facts import INPAINTING_CHANNELS, NOT_A_CHECKPOINT, SDXL, read_checkpoint
from sdxl_worker.generate.prediction import predicting, wanted_prediction
from sdxl_worker.generate.vae_files import find_vae
from sdxl_worker.prediction_marks import EDM, Prediction
from sdxl_worker.settings import Settings
from sdxl_worker.text import clean_text

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)

_IN_CHANNELS = (4, INPAINTING_CHANNELS)


def load_pipeline(settings: Settings) -> tuple[StableDiffusionXLPipeline, BaseModel]:
    """The resident pipeline, float16 on the GPU where there is one, else float32 on the CPU; and where it was found.

    Raises ModelUnavailable, with one sentence that says what to set or run.
    """
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = find_base_model(settings)
    prediction = wanted_prediction(settings.prediction_type, _said_prediction(model, settings))
    if model.kind == "tiny":
        _write_example_lora(settings)
        pipeline = topology.build_sdxl(topology.TINY, dtype=dtype, device=device)
    else:
        pipeline = _load_from_disk(model, settings, dtype, device)
    pipeline.set_progress_bar_config(disable=True)
    if prediction is not None:
        zero_snr = " with zero terminal SNR" if prediction.zero_snr else ""
        logger.info("the base model predicts %s%s, says %s", prediction.kind, zero_snr, prediction.source)
        pipeline.scheduler = predicting(pipeline.scheduler, prediction)
    elif "EDM" in type(pipeline.scheduler).__name__:
        raise _is_edm(model, f"its scheduler is {type(pipeline.scheduler).__name__}")
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            # Once and for all: diffusers' eval() leaves it on, and some CPU kernels round differently with it.
            module.eval().requires_grad_(False)
    return pipeline, model


def _said_prediction(model: BaseModel, settings: Settings) -> Prediction:
    """What the header of a single file says; a folder says it in its scheduler's config, which diffusers reads.

    Raises ModelUnavailable for what the header shows to be another model.
    """
    if model.kind != "file" or model.path is None:
        return Prediction()
    try:
        facts = read_checkpoint(model.path)
    except AssetFileError as error:
        raise cannot_be_loaded(model, f"{error}; check MODEL_ID") from None
    if facts.model not in (SDXL, NOT_A_CHECKPOINT):
        raise cannot_be_loaded(model, f"it is a checkpoint of {facts.model}, and this worker runs SDXL; set MODEL_ID")
    if facts.model == SDXL and facts.in_channels not in _IN_CHANNELS:
        raise cannot_be_loaded(model, f"its UNet takes {facts.in_channels} channels, not 4 or 9; set MODEL_ID")
    if facts.prediction.kind == EDM and not settings.prediction_type:
        raise _is_edm(model, facts.prediction.source)
    return facts.prediction


def cannot_be_loaded(model: BaseModel, reason: str, role: str = "base model") -> ModelUnavailable:
    """The error for a model that was found and is not one for this worker."""
    return ModelUnavailable(f"the {role} {model.name} cannot be loaded: {reason}")


def _is_edm(model: BaseModel, source: str) -> ModelUnavailable:
    return cannot_be_loaded(model, f"it is an EDM model ({source}), whose samplers are not here; set MODEL_ID")


def _write_example_lora(settings: Settings) -> None:
    try:
        topology.write_example_lora(settings.lora_cache_dir)
    except OSError as error:
        logger.warning("the tiny model's example LoRA cannot be written (%s)", error.strerror or type(error).__name__)


def _load_from_disk(model: BaseModel, settings: Settings, dtype: torch.dtype, device: str) -> StableDiffusionXLPipeline:
    vae_path = find_vae(settings) if model.allow_vae_override and device == "cuda" else None
    with reading(model, "MODEL_ID", "base model"):
        # Only what diffusers takes no device for, a single file's parts, is not there yet.
        return _from_files(model, vae_path, dtype, device).to(device)


@contextlib.contextmanager
def reading(model: BaseModel, variable: str, role: str) -> Iterator[None]:
    """Around reading the model that `variable` names: no bars in the log, ModelUnavailable for what libraries raise."""
    try:
        with _no_progress_bars():
            yield
        return
    except torch.OutOfMemoryError:
        reason = "it does not fit into the device's memory; take a larger GPU"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        # The library's message may name folders: it is for the log, and the answer says what to do.
        logger.error("loading %s: %s: %s", model.name, type(error).__name__, clean_text(str(error)))
        what = "checkpoint, or its configs cannot be fetched" if model.kind == "file" else "model"
        reason = f"it is not a complete SDXL {what}; check {variable}"
    raise cannot_be_loaded(model, reason, role)


def _from_files(
    model: BaseModel, vae_path: Path | None, dtype: torch.dtype, device: str = "cpu"
) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    own = {} if vae_path is None else {"vae": _load_vae(vae_path, model, dtype, device)}
    return pipeline_from(StableDiffusionXLPipeline, model, dtype, device, **own)


def pipeline_from(
    pipeline_class: Any, model: BaseModel, dtype: torch.dtype, device: str = "cpu", **components: Any
) -> Any:
    """The pipeline of that diffusers class from the model's folder or file; `components` are not read.

    A folder's weights are put on the device one by one as they are read; a single file's are on the CPU.
    """
    options = {"dtype": dtype, "add_watermarker": False, **components}
    if model.kind == "file":
        return pipeline_class.from_single_file(str(model.path), **options, **_configs(model))
    return pipeline_class.from_pretrained(str(model.path), variant=model.variant, **options, **_straight_to(device))


def _straight_to(device: str) -> dict[str, str]:
    """Options of from_pretrained. Without them all weights would be in host memory first, in the device's precision.

    One device means no hooks of accelerate. On the CPU there is nothing to avoid: weights stay mapped.
    """
    return {} if device == "cpu" else {"device_map": device}


def _load_vae(path: Path, model: BaseModel, dtype: torch.dtype, device: str) -> Any:
    """A VAE from a diffusers folder, or from a single file of any naming with the config of the model's own VAE."""
    from diffusers import AutoencoderKL

    if path.is_dir():
        return AutoencoderKL.from_pretrained(str(path), dtype=dtype, **_straight_to(device))
    configs = {"config": str(model.path)} if model.kind == "folder" else _configs(model)
    return AutoencoderKL.from_single_file(
        str(path), dtype=dtype, **configs, **({"subfolder": "vae"} if configs else {})
    )


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the libraries' bars out of the log while they load, and leave the switches as they were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as switches:
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                switches.callback(library.enable_progress_bar)
        yield


def _configs(model: BaseModel) -> dict[str, str]:
    """A single file has no configs and tokenizers: a folder of its name beside it may hold them, else the Hub does."""
    assert model.path is not None
    folder = model.path.with_suffix("")
    return {"config": str(folder)} if (folder / "model_index.json").is_file() else {}
