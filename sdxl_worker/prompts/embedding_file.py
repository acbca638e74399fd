"""Read and check an embedding (textual inversion): one vector or more for each of SDXL's two text encoders.

The names that trainers write: `clip_l` and `clip_g` (A1111, ComfyUI, diffusers' advanced script, kohya), and
`text_encoders_0` and `text_encoders_1` (cog-sdxl's embeddings.pti). Embeddings of models with one text encoder have one
tensor, often below `string_to_param` (https://github.com/AUTOMATIC1111/stable-diffusion-webui, textual_inversion.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.assets.safetensors_file import Header, read_header, stream_tensors
from sdxl_worker.errors import AssetFileError, EmbeddingIncompatible, WrongFile
from sdxl_worker.lora.file import check_values
from sdxl_worker.lora.keys import sort_keys
from sdxl_worker.lora.metadata import json_object
from sdxl_worker.prompts.chunks import CHUNK_PLACES
from sdxl_worker.prompts.vectors import ENCODERS, VectorTable
from sdxl_worker.text import clean_text

if TYPE_CHECKING:
    import torch

CLIP_NAMES = ("clip_l", "clip_g")
COG_NAMES = ("text_encoders_0", "text_encoders_1")
SDXL_WIDTHS = (768, 1280)
# What one tensor alone was made for, by its width.
_SINGLE = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}
# Tensors beside clip_l that another model's third encoder reads.
_FOREIGN = {"t5": "Stable Diffusion 3 or Flux", "t5xxl": "Stable Diffusion 3 or Flux"}
# cog-sdxl's names of single vectors, and how many words of a token map are read.
_SEPARATE, _MAX_WORDS = re.compile(r"<s(\d{1,3})>"), 20
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class EmbeddingContent:
    """A checked file in memory: `vectors` for each text encoder, as many for both.

    `separate` says that each of them also has a token of its own, `<s0>`, `<s1>` and so on, as cog-sdxl writes them;
    `token_map` are words that stand for some of those in a row, by their numbers.
    """

    vectors: VectorTable
    separate: bool = False
    token_map: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def check_embedding_file(path: Path) -> dict[str, Any]:
    """All that can be checked without the base model: names, shapes, and that every value is a sane number.

    Gives the file's facts, JSON-ready. Raises BadFile (broken or hostile), WrongFile (another kind of file) or
    EmbeddingIncompatible (for another base model, more vectors than a prompt's chunk has places).
    """
    header = read_header(path)
    names = _names_in(header)
    for name, tensor in stream_tensors(path):
        check_values(name, tensor)
    shapes = [rows_of(header.shapes[name]) for name in names]
    known = tuple(width for _, width in shapes) == SDXL_WIDTHS
    return {
        "base_model": "SDXL" if known else "unknown",
        "tensors": len(names),
        "vectors": shapes[0][0],
        "title": clean_text(header.metadata.get("name") or header.metadata.get("modelspec.title")),
    }


def read_embedding(path: Path, widths: Sequence[int]) -> EmbeddingContent:
    """The checked file in memory; `widths` are the resident text encoders'. Raises like check_embedding_file."""
    header = read_header(path)
    names = _names_in(header)
    found = {}
    for name, tensor in stream_tensors(path):
        check_values(name, tensor)
        if name in names:
            found[name] = tensor.clone()
    vectors = fitted([found[name] for name in names], widths)
    if names != COG_NAMES:
        return EmbeddingContent(vectors)
    return EmbeddingContent(vectors, True, _token_map(header, len(vectors[ENCODERS[0]])))


def _token_map(header: Header, count: int) -> dict[str, tuple[int, ...]]:
    """What cog-sdxl's special_params.json says, `{"TOK": "<s0><s1>"}`, without what is not of this form."""
    found = {}
    for name, value in list(json_object(header.metadata.get("token_map")).items())[:_MAX_WORDS]:
        text = clean_text(value)
        rows = tuple(int(row) for row in _SEPARATE.findall(text))
        if rows and max(rows) < count and not _SEPARATE.sub("", text).strip() and clean_text(name):
            found[clean_text(name)] = rows
    return found


def fitted(tensors: Sequence[torch.Tensor], widths: Sequence[int]) -> VectorTable:
    """One tensor for each text encoder as vectors; raises EmbeddingIncompatible when they do not fit its width."""
    check_shapes([tuple(tensor.shape) for tensor in tensors])
    vectors = [tensor.reshape(rows_of(tuple(tensor.shape))) for tensor in tensors]
    found = [int(rows.shape[1]) for rows in vectors]
    if found != list(widths):
        raise EmbeddingIncompatible(
            f"the embedding's vectors are {found[0]} and {found[1]} numbers wide and this model's text encoders "
            f"{widths[0]} and {widths[1]}: it is for another base model"
        )
    return dict(zip(ENCODERS, vectors, strict=True))


def check_shapes(shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise EmbeddingIncompatible unless both are as many vectors, at least one and at most a chunk's places."""
    if any(len(shape) not in (1, 2) or 0 in shape for shape in shapes):
        raise EmbeddingIncompatible("the embedding's tensors are not lists of vectors")
    counts = [rows_of(shape)[0] for shape in shapes]
    if len(set(counts)) > 1:
        raise EmbeddingIncompatible(
            f"the embedding has {counts[0]} vectors for one text encoder and {counts[1]} for the other"
        )
    if counts[0] > CHUNK_PLACES:
        raise EmbeddingIncompatible(f"the embedding has {counts[0]} vectors and a prompt has room for {CHUNK_PLACES}")


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(vectors, width) of a tensor of one or two dimensions: a single vector may lack the first."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def made_for_another(shapes: Mapping[str, tuple[int, ...]]) -> AssetFileError:
    """The error for tensors that are not an embedding of SDXL, which says what they are."""
    foreign = next((model for name, model in _FOREIGN.items() if name in shapes and "clip_l" in shapes), None)
    if foreign:
        return EmbeddingIncompatible(f"this embedding is for {foreign}; this worker runs SDXL")
    vectors = {name: shape for name, shape in shapes.items() if len(shape) in (1, 2) and 0 not in shape}
    if len(vectors) == len(shapes) == 1:
        (width,) = [rows_of(shape)[1] for shape in vectors.values()]
        if width in _SINGLE:
            return EmbeddingIncompatible(f"this embedding is for {_SINGLE[width]}; this worker runs SDXL")
        return EmbeddingIncompatible(
            f"this embedding has vectors for one text encoder, {width} numbers wide; one for SDXL has two, 768 and 1280"
        )
    if {*CLIP_NAMES, *COG_NAMES} & set(shapes):
        odd = next((name for name in shapes if name not in (*CLIP_NAMES, *COG_NAMES)), "")
        return EmbeddingIncompatible(f"the embedding holds a tensor this worker does not know, {clean_text(odd)!r}")
    if sort_keys(list(shapes)).modules:
        return WrongFile("the file is a LoRA, not an embedding: name it in `loras`")
    return WrongFile(f"none of the file's {len(shapes)} tensors belongs to an embedding; it may be a checkpoint")


def _names_in(header: Header) -> tuple[str, str]:
    """The tensors for the two text encoders, judged by names, types and shapes, before a value is touched."""
    # Numbers beside the vectors, such as how many steps the training took, change nothing.
    shapes = {name: shape for name, shape in header.shapes.items() if shape not in ((), (0,)) or "clip" in name}
    names = next((pair for pair in (CLIP_NAMES, COG_NAMES) if set(pair) == set(shapes)), None)
    if names is None:
        if not shapes:
            raise WrongFile("the file holds no vectors")
        raise made_for_another(shapes)
    check_shapes([shapes[name] for name in names])
    if odd := next((name for name in names if header.entries[name].dtype not in _FLOATS), None):
        raise EmbeddingIncompatible(f"the tensor {odd} holds {header.entries[odd].dtype} numbers, which are no vectors")
    return names
