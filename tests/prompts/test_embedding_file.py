"""Which files are embeddings of SDXL, and what is said of those that are not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_worker.errors import BadFile, EmbeddingIncompatible, WorkerError, WrongFile
from sdxl_worker.kinds import EMBEDDING, LORA
from sdxl_worker.prompts.embedding_file import check_embedding_file, read_embedding

L, G = torch.ones(2, 768), torch.ones(2, 1280)


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path = tmp_path / "file.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        ({"clip_l": L, "clip_g": G}, 2),
        ({"clip_g": G.half(), "clip_l": L.bfloat16()}, 2),
        ({"clip_l": L[0], "clip_g": G[0]}, 1),
        ({"clip_l": L, "clip_g": G, "step": torch.tensor(500.0)}, 2),
        ({"text_encoders_0": L, "text_encoders_1": G}, 2),
        ({"clip_l": L.repeat(38, 1)[:75], "clip_g": G.repeat(38, 1)[:75]}, 75),
    ],
)
def test_an_embedding_of_sdxl(tensors: dict[str, torch.Tensor], count: int, tmp_path: Path) -> None:
    path = saved(tmp_path, tensors, name="Bad hands\n")
    facts = check_embedding_file(path)
    assert facts == {"base_model": "SDXL", "tensors": 2, "vectors": count, "title": "Bad hands"}
    found = read_embedding(path, (768, 1280))
    assert [tuple(rows.shape) for rows in found.vectors.values()] == [(count, 768), (count, 1280)]
    assert found.separate == ("text_encoders_0" in tensors)


@pytest.mark.parametrize(
    ("tensors", "error", "sentence"),
    [
        ({"string_to_param.*": L}, EmbeddingIncompatible, "for Stable Diffusion 1.5"),
        ({"<cat>": L[0]}, EmbeddingIncompatible, "for Stable Diffusion 1.5"),
        ({"clip_l": L}, EmbeddingIncompatible, "for Stable Diffusion 1.5"),
        ({"string_to_param.*": torch.ones(2, 1024)}, EmbeddingIncompatible, "for Stable Diffusion 2;"),
        ({"clip_g": G}, EmbeddingIncompatible, "for one text encoder, 1280 numbers wide"),
        ({"clip_l": L, "t5": torch.ones(1, 4096)}, EmbeddingIncompatible, "for Stable Diffusion 3 or Flux"),
        ({"clip_l": L, "clip_g": G, "t5xxl": L}, EmbeddingIncompatible, "for Stable Diffusion 3 or Flux"),
        ({"clip_l": L, "clip_g": G, "clip_l_out": L}, EmbeddingIncompatible, "does not know, 'clip_l_out'"),
        ({"clip_l": L, "clip_g": G[:1]}, EmbeddingIncompatible, "2 vectors for one text encoder and 1 for the other"),
        ({"clip_l": L.repeat(38, 1), "clip_g": G.repeat(38, 1)}, EmbeddingIncompatible, "has 76 vectors"),
        ({"clip_l": torch.ones(10_000, 8), "clip_g": torch.ones(10_000, 8)}, EmbeddingIncompatible, "10000 vectors"),
        ({"clip_l": L[None], "clip_g": G}, EmbeddingIncompatible, "not lists of vectors"),
        ({"clip_l": torch.ones(0, 768), "clip_g": torch.ones(0, 1280)}, EmbeddingIncompatible, "not lists of"),
        ({"clip_l": torch.tensor(1.0), "clip_g": torch.tensor(1.0)}, EmbeddingIncompatible, "not lists of"),
        ({"clip_l": L.long(), "clip_g": G.long()}, EmbeddingIncompatible, "I64 numbers"),
        ({"clip_l": L, "clip_g": G * torch.nan}, BadFile, "clip_g holds values that are not finite"),
        ({"clip_l": L * 1e9, "clip_g": G}, BadFile, "clip_l holds values that are not finite or far too large"),
        ({"lora_unet_x.lora_up.weight": L, "lora_unet_x.lora_down.weight": L}, WrongFile, "is a LoRA.*`loras`"),
        ({"model.a.weight": L, "model.b.weight": L}, WrongFile, "may be a checkpoint"),
        ({"step": torch.tensor(1.0)}, WrongFile, "holds no vectors"),
    ],
)
def test_what_is_not_one(tensors: dict[str, torch.Tensor], error: type[WorkerError], sentence: str, tmp_path) -> None:
    path = saved(tmp_path, tensors)
    for ask in (check_embedding_file, lambda path: read_embedding(path, (768, 1280))):
        with pytest.raises(error, match=sentence):
            ask(path)


def test_another_model_s_widths(tmp_path: Path) -> None:
    path = saved(tmp_path, {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)})
    assert check_embedding_file(path)["base_model"] == "unknown"
    assert read_embedding(path, (16, 24)).vectors["text_encoder"].shape == (1, 16)
    with pytest.raises(EmbeddingIncompatible, match=r"16 and 24 numbers wide and .* text encoders 768 and 1280"):
        read_embedding(path, (768, 1280))


def test_a_header_that_promises_more_than_memory_is_refused_by_its_shapes(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    entry = {"dtype": "F32", "shape": [2**40, 768], "data_offsets": [0, 2**40 * 768 * 4]}
    header = json.dumps({"clip_l": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadFile):
        check_embedding_file(path)


def test_the_kind_has_its_own_codes_and_facts(tmp_path: Path) -> None:
    path = saved(tmp_path, {"clip_l": L, "clip_g": G})
    assert EMBEDDING.check(path)["format"] == "textual inversion"
    with pytest.raises(WorkerError, match="it is an embedding: name it in `embeddings`"):
        LORA.check(path)
    path.write_text("<html>log in</html>")
    with pytest.raises(WorkerError) as failure, EMBEDDING.own_codes():
        EMBEDDING.check(path)
    assert failure.value.code == "NOT_AN_EMBEDDING"
