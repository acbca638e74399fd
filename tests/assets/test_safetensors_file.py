"""Headers that lie, and files that are something else (fault list: broken and hostile files)."""

from __future__ import annotations

import json
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
from tests.support.fresh_process import cost_of

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
    "huge sides beside a 0": {"a": ENTRY, "b": ENTRY | {"shape": [2**47, 2**47, 0], "data_offsets": [8, 8]}},
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


READ = """
try:
    read_header(path)
except BadFile as error:
    assert {expected!r} in str(error), error
else:
    raise AssertionError("accepted")
"""


def cost_of_refusing(path: Path, expected: str) -> tuple[int, float]:
    setup = f"""
from sdxl_worker.assets.safetensors_file import read_header
from sdxl_worker.errors import BadFile
path = Path({str(path)!r})
"""
    return cost_of(READ.format(expected=expected), setup)


def test_a_huge_header_is_not_read(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20) + b"{")
        file.truncate(101 * 2**20)
    assert cost_of_refusing(path, "longer than")[0] < 8 * 2**20


FULL = 16 * 2**20
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
CROWDED = {
    "metadata of a million names": b'{"__metadata__":{%s}}' % b",".join(b'"%x":""' % i for i in range(FULL // 12)),
    "a million tensors": b"{%s}" % b",".join(b'"%x":0' % i for i in range(FULL // 11)),
    "a shape of a million sides": b'{"a":{"dtype":"F32","shape":[%s0],"data_offsets":[0,0]}}'
    % (b"0," * (FULL // 2 - 50)),
    "a name of a million quotes": b'{"%s' % (b'\\"' * (FULL // 2 - 10)),
    "empty texts": b"{%s" % (b'"":"",' * (FULL // 6 - 10)),
    "lists in lists": b'{"a":%s' % (b"[" * (FULL - 10)),
}


@pytest.mark.parametrize("name", [name for name in CROWDED if name != "a name of a million quotes"])
def test_a_crowded_header_is_refused_before_it_is_parsed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    assert len(CROWDED[name]) <= MAX_HEADER_BYTES
    with pytest.raises(BadFile, match="more names and numbers"):
        read_header(_file(tmp_path / "a.safetensors", CROWDED[name], b""))


@pytest.mark.parametrize("name", CROWDED)
def test_no_header_takes_long_or_much(name: str, tmp_path: Path):
    path = _file(tmp_path / "a.safetensors", CROWDED[name], b"")
    grown, seconds = cost_of_refusing(path, "JSON" if "quotes" in name else "more names and numbers")
    # Measured: 32 MB and 0.1 s; 430 MB and 2.6 s before.
    assert grown < 100 * 2**20
    assert seconds < 2


def test_too_many_tensors_are_refused(tmp_path: Path):
    many = {f"t{i}": EMPTY for i in range(30_001)}
    with pytest.raises(BadFile, match="30001 tensors"):
        read_header(_file(tmp_path / "a.safetensors", many, b""))
    del many["t0"]
    assert len(read_header(_file(tmp_path / "b.safetensors", many, b"")).entries) == 30_000


@pytest.mark.parametrize("letters", [513, 12 * 2**20])
def test_a_long_tensor_name_is_refused(letters: int, tmp_path: Path):
    with pytest.raises(BadFile, match="longer than any") as caught:
        read_header(_file(tmp_path / "a.safetensors", {"x" * letters: ENTRY}))
    assert len(str(caught.value)) < 300
    assert list(read_header(_file(tmp_path / "b.safetensors", {"x" * 512: ENTRY})).entries) == ["x" * 512]


def test_the_metadata_of_a_long_training_is_read(tmp_path: Path):
    # kohya's sd-scripts write how often each tag occurs, twice, as JSON inside a text: megabytes for a large data set.
    tags = json.dumps({"1_style": {f"a longer tag, number {i}": i for i in range(70_000)}})
    metadata = {f"ss_{i}": "x" for i in range(100)} | {"ss_tag_frequency": tags, "ss_datasets": json.dumps([tags])}
    tensors = {f"lora_unet_{i}.lora_down.weight": EMPTY for i in range(8_000)}
    path = _file(tmp_path / "a.safetensors", {"__metadata__": metadata, **tensors}, b"")
    assert path.stat().st_size > 6 * 2**20
    assert read_header(path).metadata == metadata


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
