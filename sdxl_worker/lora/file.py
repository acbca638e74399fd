"""Read and check a LoRA file: what it is, what it was made for, and its tensors by module."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.assets.safetensors_file import Header, read_header, read_tensors, stream_tensors, view_tensors
from sdxl_worker.errors import BadFile, LoraIncompatible
from sdxl_worker.lora.base_models import UNKNOWN, detect_base_model, foreign_model
from sdxl_worker.lora.formats import ALPHA, format_name, rank_of
from sdxl_worker.lora.keys import FileKeys, sort_keys
from sdxl_worker.lora.metadata import describe
from sdxl_worker.text import clean_text

if TYPE_CHECKING:
    import torch

# The largest float16. Beyond it a weight overflows on the GPU and the picture is black.
MAX_VALUE = 65504.0
# Bundled embeddings that are named.
_MAX_EMBEDDINGS = 20
# What an embedding of SDXL holds.
_EMBEDDING = frozenset({"clip_l", "clip_g"})
# Hex digits.
_AUTOV3 = 12


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA file is, told from tensor names and shapes first and metadata second; every text is safe to show.

    `rank` and `alpha` are the most common ones among the modules; `modules` counts what the file changes. `few_step` is
    the row of the table of few-step LoRAs that the metadata names.
    """

    format: str
    base_model: str
    tensors: int
    modules: int
    rank: int | None = None
    alpha: float | None = None
    title: str = ""
    few_step: str = ""
    author: str = ""
    trigger_words: tuple[str, ...] = ()
    top_tags: tuple[tuple[str, int], ...] = ()
    resolution: str = ""
    trained_on: str = ""
    prediction: str = ""
    embeddings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, without what the file does not say."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", ())}


@dataclass(frozen=True)
class LoraContent:
    """A checked file in memory: `tensors` (name -> tensor, in the file's dtype) are views of the one buffer `data`."""

    facts: LoraFacts
    keys: FileKeys
    header: Header
    data: torch.Tensor
    tensors: dict[str, torch.Tensor]


def made_for(model: str) -> LoraIncompatible:
    """The error for a LoRA of another base model."""
    return LoraIncompatible(f"this LoRA is for {model}; this worker runs SDXL")


def check_lora_file(path: Path) -> LoraFacts:
    """All that can be checked without the base model: header, names, and that every value is a sane number.

    Raises BadFile (broken or hostile), WrongFile (another kind of file) or LoraIncompatible (no LoRA tensors).
    """
    header = read_header(path)
    keys = _sorted_keys(header)
    alphas = {}
    for name, tensor in stream_tensors(path):
        check_values(name, tensor)
        if name.endswith(".alpha"):
            alphas[name] = tensor.clone()
    return _facts(header, keys, alphas)


def read_lora(path: Path, *, pinned: bool = False) -> LoraContent:
    """The checked file as LoraContent, its data in page-locked memory when `pinned`. Raises like check_lora_file."""
    header = read_header(path)
    keys = _sorted_keys(header)
    header, data = read_tensors(path, pinned=pinned)
    tensors = view_tensors(header, data)
    for name, tensor in tensors.items():
        check_values(name, tensor)
    return LoraContent(_facts(header, keys, tensors), keys, header, data, tensors)


def autov3(data: torch.Tensor) -> str:
    """The hash that A1111, Forge and Civitai look a safetensors LoRA up by: 12 hex digits of its data's SHA-256.

    `data` is all that follows the header (uint8, 1-D); kohya's sd-scripts calls it `addnet_hash_safetensors`.
    """
    return hashlib.sha256(data.numpy().data).hexdigest()[:_AUTOV3]


def _sorted_keys(header: Header) -> FileKeys:
    """The tensor names by module. Raises LoraIncompatible for what is not a LoRA, before a tensor is touched."""
    keys = sort_keys(header.entries)
    if empty := next((name for name, shape in header.shapes.items() if 0 in shape), None):
        raise LoraIncompatible(f"the tensor {clean_text(empty)!r} is empty")
    if keys.roles == {ALPHA}:
        raise LoraIncompatible(f"the file's {len(header.entries)} tensors are alpha values without any weights")
    if not keys.modules:
        named = [name for name in keys.unknown if "lora" in name]
        if named and (model := foreign_model(named)):
            raise made_for(model)
        kind = "it may be an embedding" if keys.embeddings else "it may be a checkpoint or something else"
        if set(keys.unknown) >= _EMBEDDING:
            kind = "it is an embedding: name it in `embeddings`"
        raise LoraIncompatible(f"none of the file's {len(header.entries)} tensors belongs to a LoRA; {kind}")
    return keys


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise BadFile, naming the tensor, for NaN, infinities, and values beyond float16."""
    import torch

    if tensor.numel() == 0:
        return
    # 8-bit floats have no comparison kernels.
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    # A comparison with NaN is false, so this one test finds it as well.
    if not (float(low) >= -MAX_VALUE and float(high) <= MAX_VALUE):
        raise BadFile(f"the tensor {clean_text(name)} holds values that are not finite or far too large")


def _facts(header: Header, keys: FileKeys, tensors: Mapping[str, torch.Tensor]) -> LoraFacts:
    shapes = header.shapes
    modules = [{role: shapes[key] for role, key in roles.items()} for roles in keys.modules.values()]
    ranks = Counter(rank for module in modules if (rank := rank_of(module)))
    alpha_keys = [roles[ALPHA] for roles in keys.modules.values() if ALPHA in roles]
    alphas = Counter(float(tensors[key].flatten()[0]) for key in alpha_keys)
    return LoraFacts(
        format=format_name(modules) or UNKNOWN,
        base_model=detect_base_model(keys, shapes, header.metadata),
        tensors=len(header.entries),
        modules=len(keys.modules),
        rank=ranks.most_common(1)[0][0] if ranks else None,
        alpha=alphas.most_common(1)[0][0] if alphas else None,
        embeddings=tuple(clean_text(name) for name in keys.embeddings[:_MAX_EMBEDDINGS]),
        **describe(header.metadata),
    )
