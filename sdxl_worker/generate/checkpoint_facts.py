"""What a checkpoint in one .safetensors file is, told from its header: no tensor is read.

Tensor names: https://github.com/Stability-AI/generative-models (SDXL) and https://github.com/CompVis/stable-diffusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.assets.safetensors_file import DTYPES, Header, read_header
from sdxl_worker.prediction_marks import Prediction, read_prediction

SDXL = "SDXL"
REFINER = "SDXL refiner"
NOT_A_CHECKPOINT = "not a checkpoint"
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
            there = {"parts": list(self.parts)} if self.parts else {}
            return {"is": self.model, **there, "tensors": self.tensors, "dtype": self.dtype}
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


def _has_all(names: Collection[str], prefixes: Collection[str]) -> bool:
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
