"""The embeddings that a LoRA file holds: OneTrainer's `bundle_emb.NAME.clip_l` and `.clip_g`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdxl_worker.errors import AssetFileError
from sdxl_worker.prompts.embedding_file import CLIP_NAMES, fitted, made_for_another
from sdxl_worker.prompts.vectors import VectorTable
from sdxl_worker.request import MAX_EMBEDDINGS
from sdxl_worker.text import clean_text

if TYPE_CHECKING:
    import torch

# What AUTOMATIC1111's `string_to_param` calls the one tensor that it has.
_SINGLE = "*"


@dataclass(frozen=True)
class Bundled:
    """The usable embeddings of a LoRA file by name, and a sentence for each one that is left out."""

    embeddings: Mapping[str, VectorTable] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def bundled_in(
    bundled: Mapping[str, Mapping[str, str]], tensors: Mapping[str, torch.Tensor], widths: Sequence[int]
) -> Bundled:
    """The embeddings whose tensors are `tensors[bundled[name][part]]`; `widths` are those of the text encoders.

    One that does not fit is left out: the LoRA is good without it, and its tensors change nothing.
    """
    found: dict[str, VectorTable] = {}
    warnings = []
    for name, parts in list(bundled.items())[:MAX_EMBEDDINGS]:
        shown = clean_text(name)
        try:
            if not shown:
                raise AssetFileError("it has no name that could stand in a prompt")
            found[shown] = _vectors({part: tensors[key] for part, key in parts.items()}, widths)
        except AssetFileError as problem:
            warnings.append(f"the bundled embedding {shown!r} is not applied: {problem}")
    if len(bundled) > MAX_EMBEDDINGS:
        warnings.append(f"{len(bundled) - MAX_EMBEDDINGS} of {len(bundled)} bundled embeddings are not applied")
    return Bundled(found, tuple(warnings))


def _vectors(parts: Mapping[str, torch.Tensor], widths: Sequence[int]) -> VectorTable:
    if set(parts) == {_SINGLE} and parts[_SINGLE].shape[-1:] == (sum(widths),):
        return fitted(parts[_SINGLE].split(tuple(widths), dim=-1), widths)
    if set(parts) != set(CLIP_NAMES):
        raise made_for_another({part: tuple(tensor.shape) for part, tensor in parts.items()})
    return fitted([parts[name] for name in CLIP_NAMES], widths)
