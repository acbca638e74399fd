"""Headers that lie, and files that are something else (FAULTS: broken and hostile files)."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_worker.assets.safetensors_file import (
    MAX_HEADER_BYTES,
    copy_with_metadata,
    read_header,
    read_tensors,
    view_tensors,
)
from sdxl_worker.errors import BadFile, WrongFile

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


BAD = {
    "no data_offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown dtype": {"a": ENTRY | {"dtype": "F33"}},
    "dtype of another type": {"a": ENTRY | {"dtype": ["F32"]}},
    "size and shape differ": {"a": ENTRY | {"shape": [3]}},
    "negative shape": {"a": ENTRY | {"shape": [-1, -2]}},
    "shape is true": {"a": ENTRY | {"shape": [True, 2]}},
    "shape overflows": {"a": ENTRY | {"shape": [2**40, 2**40]}},
    "offsets past the end": {"a": ENTRY | {"data_offsets": [8, 16]}},
    "offsets reversed": {"a": ENTRY | {"data_offsets": [8, 0]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "a gap": {
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]},
    },
    "metadata is a list": {"__metadata__": [1], "a": ENTRY},
    "metadata holds a number": {"__metadata__": {"r": 1}, "a": ENTRY},
    "entry is a list": {"a": [1, 2]},
    "not JSON": b"{nope",
    "deep JSON": b'{"a":' * 100_000,
    "not an object": b"[1]",
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path):
    with pytest.raises(BadFile) as caught:
        read_header(_file(tmp_path / "a.safetensors", BAD[name]))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"12345678", b"PK\3\4 a zip", b"\x80\x02 a pickle, renamed"])
def test_another_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(BadFile):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"<!doctype html><p>log in", b"\n <html>"])
def test_a_web_page_is_not_a_lora(content: bytes, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WrongFile, match="web page"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["truncated", "trailing bytes"]
)
def test_every_byte_is_accounted_for(change, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, str(path))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadFile, match="cut off or padded"):
        read_header(path)


def test_a_huge_header_is_not_read(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20) + b"{")
        file.truncate(101 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadFile, match="longer than"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def test_a_header_of_empty_tensors_is_refused(tmp_path: Path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(700_000)}, separators=(",", ":")).encode()
    assert len(header) > MAX_HEADER_BYTES
    with pytest.raises(BadFile, match="longer than"):
        read_header(_file(tmp_path / "a.safetensors", header, b""))
    fitting = json.dumps({f"t{i}": entry for i in range(40_000)}).encode()
    with pytest.raises(BadFile, match="40000 tensors"):
        read_header(_file(tmp_path / "b.safetensors", fitting, b""))


def test_reads_what_the_library_reads(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(2, 3).half(),
        "brain": torch.randn(5).bfloat16(),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(4.0),
        "empty": torch.empty(0, 7),
    }
    save_file(tensors, str(path), {"title": "x"})
    header, data = read_tensors(path)
    views = view_tensors(header, data)
    assert header.metadata == {"title": "x"}
    for name, expected in load_file(str(path)).items():
        assert views[name].dtype == expected.dtype
        assert views[name].shape == expected.shape
        assert torch.equal(views[name].float(), expected.float())


def test_misaligned_tensors_are_read(tmp_path: Path):
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    data = b"\7" + struct.pack("<f", 1.5)
    views = view_tensors(*read_tensors(_file(tmp_path / "a.safetensors", header, data)))
    assert views["b"].item() == 1.5


def test_metadata_is_added_and_the_tensors_stay(tmp_path: Path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a": torch.randn(3), "b": torch.randn(2, 2).half()}, str(source), {"title": "x"})
    copy_with_metadata(source, target, {"more": '{"é": 1}'})
    assert read_header(target).metadata == {"title": "x", "more": '{"é": 1}'}
    before, after = load_file(str(source)), load_file(str(target))
    assert all(torch.equal(before[name], after[name]) for name in ("a", "b"))


def test_a_file_truncated_while_held_does_not_matter(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(10_000)}, str(path))
    views = view_tensors(*read_tensors(path))
    with path.open("r+b") as file:
        file.truncate(10)
    assert views["a"].sum() == 10_000
