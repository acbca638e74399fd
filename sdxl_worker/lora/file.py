"""Read and check a LoRA file: what it is, what it was made for, and its tensors by module."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.assets.safetensors_file import Header, read_header, read_tensors, stream_tensors, view_tensors
from sdxl_worker.errors import BadFile, LoraIncompatible
from sdxl_worker.lora.base_models import UNKNOWN, detect_base_model
from sdxl_worker.lora.keys import FileKeys, sort_keys
from sdxl_worker.lora.metadata import describe, peft_alphas
from sdxl_worker.text import clean_text

if TYPE_CHECKING:
    import torch

# The largest float16. Beyond it a weight overflows on the GPU and the picture is black.
MAX_VALUE = 65504.0
# Hex digits.
_AUTOV3 = 12

# Role -> the name people know the format by; a file may mix several.
_FORMATS = {
    "magnitude": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "a1": "GLoRA",
    "diff": "full difference",
    "w_norm": "norm difference",
}


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA file is, told from tensor names and shapes first and metadata second; every text is safe to show.

    `rank` and `alpha` are the most common ones among the modules; `modules` counts what the file changes; `autov3` is
    said by check_lora_file only.
    """

    format: str
    base_model: str
    tensors: int
    modules: int
    rank: int | None = None
    alpha: float | None = None
    title: str = ""
    author: str = ""
    trigger_words: tuple[str, ...] = ()
    top_tags: tuple[tuple[str, int], ...] = ()
    resolution: str = ""
    trained_on: str = ""
    embeddings: tuple[str, ...] = ()
    autov3: str = ""

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
    peft: dict[str, Any]


def check_lora_file(path: Path) -> LoraFacts:
    """All that can be checked without the base model: header, names, and that every value is a sane number.

    Raises BadFile (broken or hostile), WrongFile (another kind of file) or LoraIncompatible (no LoRA tensors).
    """
    header = read_header(path)
    keys = _sorted_keys(header)
    alphas, data = {}, hashlib.sha256()
    for name, tensor in stream_tensors(path):
        _check_values(name, tensor)
        data.update(_bytes(tensor))
        if name.endswith(".alpha"):
            alphas[name] = tensor.clone()
    return replace(_facts(header, keys, alphas), autov3=data.hexdigest()[:_AUTOV3])


def read_lora(path: Path, *, pinned: bool = False) -> LoraContent:
    """The checked file as LoraContent, its data in page-locked memory when `pinned`. Raises like check_lora_file."""
    header = read_header(path)
    keys = _sorted_keys(header)
    header, data = read_tensors(path, pinned=pinned)
    tensors = view_tensors(header, data)
    for name, tensor in tensors.items():
        _check_values(name, tensor)
    return LoraContent(_facts(header, keys, tensors), keys, header, data, tensors, peft_alphas(header.metadata))


def autov3(data: torch.Tensor) -> str:
    """The hash that A1111, Forge and Civitai look a safetensors LoRA up by: 12 hex digits of its data's SHA-256.

    `data` is all that follows the header (uint8, 1-D); kohya's sd-scripts calls it `addnet_hash_safetensors`.
    """
    return hashlib.sha256(_bytes(data)).hexdigest()[:_AUTOV3]


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _sorted_keys(header: Header) -> FileKeys:
    keys = sort_keys(header.entries)
    if not keys.modules:
        kind = "an embedding" if keys.embeddings else "a checkpoint or something else"
        raise LoraIncompatible(f"none of the file's {len(header.entries)} tensors belongs to a LoRA; it may be {kind}")
    return keys


def _check_values(name: str, tensor: torch.Tensor) -> None:
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
    ranks = Counter(rank for roles in keys.modules.values() if (rank := _rank(roles, shapes)))
    alphas = Counter(float(tensors[key].flatten()[0]) for key in _alpha_keys(keys, shapes) if key in tensors)
    return LoraFacts(
        format=_format(keys, shapes),
        base_model=detect_base_model(keys, shapes, header.metadata),
        tensors=len(header.entries),
        modules=len(keys.modules),
        rank=ranks.most_common(1)[0][0] if ranks else None,
        alpha=alphas.most_common(1)[0][0] if alphas else None,
        embeddings=tuple(clean_text(name) for name in keys.embeddings),
        **describe(header.metadata),
    )


def _alpha_keys(keys: FileKeys, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [roles["alpha"] for roles in keys.modules.values() if "alpha" in roles and 0 not in shapes[roles["alpha"]]]


def _rank(roles: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2"):
        if role in roles and shapes[roles[role]]:
            return shapes[roles[role]][0]
    return None


def _format(keys: FileKeys, shapes: Mapping[str, tuple[int, ...]]) -> str:
    names = [_FORMATS[role] for role in _FORMATS if role in keys.roles]
    if any(len(shape) == 4 for shape in _shapes_of("oft_blocks", keys, shapes)):
        names[names.index("OFT")] = "BOFT"
    if "down" in keys.roles or "up" in keys.roles:
        kernels = [shape[2:] for shape in _shapes_of("down", keys, shapes)]
        convolution = "mid" in keys.roles or any(kernel not in ((), (1, 1)) for kernel in kernels)
        names.insert(0, "LoCon" if convolution else "LoRA")
    return " + ".join(dict.fromkeys(names)) or UNKNOWN


def _shapes_of(role: str, keys: FileKeys, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shapes[roles[role]] for roles in keys.modules.values() if role in roles]
