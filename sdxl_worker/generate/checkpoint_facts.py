"""What a checkpoint in one .safetensors file is, told from its header: no tensor is read.

Tensor names: https://github.com/Stability-AI/generative-models (SDXL) and https://github.com/CompVis/stable-diffusion.
A file says that it predicts v by the empty tensors `v_pred` and `ztsnr` (ComfyUI, SimpleTuner, NoobAI), by
`modelspec.prediction_type` (https://github.com/Stability-AI/ModelSpec; kohya) or `modelspec.predict_key` (ComfyUI).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.assets.safetensors_file import DTYPES, Header, read_header

SDXL = "SDXL"
REFINER = "SDXL refiner"
NOT_A_CHECKPOINT = "not a checkpoint"
EPSILON, V_PREDICTION, EDM = "epsilon", "v_prediction", "EDM"
INPAINTING_CHANNELS = 9

_UNET = "model.diffusion_model."
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
# The first whose tensors are all there.
_MODELS = (
    (SDXL, (_CONV_IN, "conditioner.embedders.1.model.")),
    (REFINER, (_CONV_IN, "conditioner.embedders.0.model.")),
    ("Stable Diffusion 1.5", (_CONV_IN, "cond_stage_model.transformer.")),
    ("Stable Diffusion 2", (_CONV_IN, "cond_stage_model.model.")),
    ("Stable Diffusion 3", (f"{_UNET}joint_blocks.",)),
    ("Stable Diffusion 3", ("joint_blocks.",)),
    ("Flux", (f"{_UNET}double_blocks.",)),
    ("Flux", ("double_blocks.",)),
)
_PARTS = (
    ("UNet", (_UNET,)),
    ("text encoders", ("conditioner.embedders.", "cond_stage_model.")),
    ("VAE", ("first_stage_model.",)),
)
# Beside their plain names: ComfyUI's and others' tools write a UNet with what lies beside it under its prefix.
_PREFIXES = ("", _UNET)
# How the metadata may say it, and in which words.
_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key")
_V_WORDS = frozenset({"v", "v_prediction", "v-prediction", "vpred", "v_pred", "v-pred"})
_EPSILON_WORDS = frozenset({"epsilon", "eps"})
_TRUE, _FALSE = frozenset({"true", "1"}), frozenset({"false", "0"})


@dataclass(frozen=True)
class Prediction:
    """What a model predicts (`epsilon`, `v_prediction`, or `EDM`, which has schedulers of its own).

    `zero_snr`: it was trained down to a signal of zero. `source` is what in the file says so, "" where nothing does.
    """

    kind: str = EPSILON
    zero_snr: bool = False
    source: str = ""


@dataclass(frozen=True)
class CheckpointFacts:
    """`model` is the family, or "not a checkpoint"; `in_channels` are the UNet's, 0 where there is none; `dtype` is the
    one that most of the data has."""

    model: str
    in_channels: int
    prediction: Prediction
    parts: tuple[str, ...]
    tensors: int
    dtype: str

    @property
    def is_inpainting(self) -> bool:
        """True for a UNet that takes the mask and the masked picture beside the latents."""
        return self.in_channels == INPAINTING_CHANNELS

    def as_json(self) -> dict[str, Any]:
        """What `download_weights.py --inspect` shows, JSON-ready."""
        if self.model == NOT_A_CHECKPOINT:
            return {"is": self.model, "tensors": self.tensors, "dtype": self.dtype}
        said = asdict(self.prediction)
        return {
            "is": self.model + (", inpainting" if self.is_inpainting else ""),
            "in_channels": self.in_channels,
            "prediction": said["kind"],
            "zero_terminal_snr": said["zero_snr"],
            "said_by": said["source"] or "nothing in the file",
            "parts": list(self.parts),
            "tensors": self.tensors,
            "dtype": self.dtype,
        }


def read_checkpoint(path: Path) -> CheckpointFacts:
    """The facts of the file at `path`; raises BadFile and WrongFile for what is not a safetensors file."""
    return checkpoint_facts(read_header(path))


def checkpoint_facts(header: Header) -> CheckpointFacts:
    """The facts of a file with this header."""
    names = header.entries
    model = next((name for name, marks in _MODELS if _has_all(names, marks)), NOT_A_CHECKPOINT)
    conv_in = header.shapes.get(_CONV_IN, ())
    sizes: Counter[str] = Counter()
    for entry in names.values():
        sizes[entry.dtype] += entry.end - entry.begin
    return CheckpointFacts(
        model=model,
        in_channels=conv_in[1] if len(conv_in) > 1 else 0,
        prediction=read_prediction(names, header.metadata),
        parts=tuple(part for part, prefixes in _PARTS if any(_has_all(names, [prefix]) for prefix in prefixes)),
        tensors=len(names),
        dtype=DTYPES[sizes.most_common(1)[0][0]][0] if sizes else "",
    )


def read_prediction(names: Collection[str], metadata: Mapping[str, str]) -> Prediction:
    """What a file with these tensor names and this metadata says; a tensor counts before the metadata.

    The tensor `v_pred` without `ztsnr` says that there is no zero terminal SNR, since who writes the one knows the
    other. Metadata says v only, and zero terminal SNR is then taken for given, as SDXL's v-prediction models have it.
    """
    for mark in ("edm_vpred.sigma_max", "edm_mean"):
        if mark in names:
            return Prediction(EDM, source=f"the tensor {mark}")
    for prefix in _PREFIXES:
        if f"{prefix}v_pred" in names:
            has_zero_snr = any(f"{other}ztsnr" in names for other in _PREFIXES)
            return Prediction(V_PREDICTION, has_zero_snr, f"the tensor {prefix}v_pred")
    return _of_metadata(metadata)


def _of_metadata(metadata: Mapping[str, str]) -> Prediction:
    for field in _FIELDS:
        word = metadata.get(field, "").strip().lower()
        if word in _V_WORDS:
            return Prediction(V_PREDICTION, _zero_snr_of(metadata), field)
        if word in _EPSILON_WORDS:
            return Prediction(EPSILON, source=field)
    # kohya's forks.
    for field in ("ss_v_parameterization", "ss_v_prediction"):
        if metadata.get(field, "").strip().lower() in _TRUE:
            return Prediction(V_PREDICTION, _zero_snr_of(metadata), field)
    return Prediction()


def _zero_snr_of(metadata: Mapping[str, str]) -> bool:
    return metadata.get("ss_zero_terminal_snr", "").strip().lower() not in _FALSE


def _has_all(names: Collection[str], prefixes: Collection[str]) -> bool:
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
