"""Read a safetensors file that nobody vouches for: the header is bounded and checked before any tensor is touched.

The safetensors library accepts headers that take seconds and gigabytes to parse, and hands out tensors mapped from the
file, which crash the process when someone truncates the file later. Here the header is read first, and the
tensors go into one buffer of our own. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import AssetFileError, BadFile, WrongFile

if TYPE_CHECKING:
    import torch

# kohya's tag counts make headers of several MB; a LoRA of every SDXL module has about 3,000 tensors, a LyCORIS 8,000.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 30_000
MAX_NAME = 512
MAX_DIMENSIONS = 8
# The texts, commas and opening brackets of that many tensors, and of some thousand metadata. Parsing takes as long,
# and as much memory, as there are of these: a header below CROWDED_BYTES has no room for many.
MAX_TOKENS = 20 * MAX_TENSORS + 16_384
CROWDED_BYTES = 2**20
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)|[,\[{]', re.DOTALL)

# safetensors name -> (torch name, bytes per element); 8-bit floats occur in LoRAs made for small GPUs.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` are byte offsets into the data that follows it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: entries in file order, text metadata, and how many bytes of data follow."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """The header of the file at `path`; raises BadFile or WrongFile. Reads at most MAX_HEADER_BYTES."""
    with _open(path) as file:
        return _read_header(file)


def read_tensors(path: Path, *, pinned: bool = False) -> tuple[Header, torch.Tensor]:
    """The header, and the whole data as one uint8 tensor (page-locked when `pinned`) that `view_tensors` cuts up."""
    import torch

    with _open(path) as file:
        header = _read_header(file)
        data = torch.empty(header.data_size, dtype=torch.uint8, pin_memory=pinned)
        _fill(data, file)
    return header, data


def stream_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor by name, one after the other, in memory that the next one reuses; raises like `read_header`."""
    import torch

    with _open(path) as file:
        header = _read_header(file)
        buffer = torch.empty(
            max((entry.end - entry.begin for entry in header.entries.values()), default=0), dtype=torch.uint8
        )
        for name, entry in header.entries.items():
            part = buffer[: entry.end - entry.begin]
            _fill(part, file)
            yield name, part.view(getattr(torch, DTYPES[entry.dtype][0])).reshape(entry.shape)


def _fill(buffer: torch.Tensor, file: io.BufferedReader) -> None:
    if buffer.numel() and file.readinto(buffer.numpy().data) != buffer.numel():
        raise BadFile("the file became shorter while it was read")


def view_tensors(header: Header, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensor name -> view into `data` (uint8, 1-D, any device), with the dtype and shape of the header."""
    import torch

    views = {}
    for name, entry in header.entries.items():
        part = data[entry.begin : entry.end]
        if entry.begin % DTYPES[entry.dtype][1]:
            part = part.clone()
        views[name] = part.view(getattr(torch, DTYPES[entry.dtype][0])).reshape(entry.shape)
    return views


def copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy the file at `source` to `target` with `metadata` added to its own; raises BadFile."""
    with _open(source) as file:
        header = _read_header(file)
        fields: dict[str, Any] = {
            name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
            for name, entry in header.entries.items()
        }
        text = json.dumps({"__metadata__": {**header.metadata, **metadata}, **fields}).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, output, 2**20)


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadFile(f"the file cannot be read ({error.strerror})") from error


def _read_header(file: io.BufferedReader) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise _not_safetensors(start, "the file is empty" if not start else "the file is cut off")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _not_safetensors(start, "the header is longer than the file or than any that is read")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _not_safetensors(start, "the header is not JSON")
    if len(text) > CROWDED_BYTES and _number_of_tokens(text) > MAX_TOKENS:
        raise BadFile(f"the header holds more names and numbers than {MAX_TENSORS} tensors need")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFile("the header is not valid JSON") from None
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile("the metadata is not a table of texts")
    entries = _checked_entries(raw, size - 8 - length)
    return Header(entries, metadata, size - 8 - length)


def _number_of_tokens(text: bytes) -> int:
    """How many texts, commas and opening brackets there are; counted no further than needed."""
    return sum(1 for _ in islice(_TOKEN.finditer(text), MAX_TOKENS + 1))


def _not_safetensors(start: bytes, reason: str) -> AssetFileError:
    if start.lstrip()[:1] == b"<":
        return WrongFile(
            "the file is a web page, not a safetensors file; the link may need a login or lead to a page about the file"
        )
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return BadFile("the file is a pickle under a safetensors name")
    return BadFile(f"the file is not a safetensors file: {reason}")


def _checked_entries(raw: Mapping[str, Any], data_size: int) -> dict[str, TensorEntry]:
    if len(raw) > MAX_TENSORS:
        raise BadFile(f"the file has {len(raw)} tensors, more than the {MAX_TENSORS} that are read")
    entries = {name: _entry(name, value) for name, value in raw.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in ordered.items():
        if entry.begin != end:
            raise BadFile(f"the data of tensor {_short(name)} overlaps another or leaves a gap")
        end = entry.end
    if end != data_size:
        raise BadFile(f"the file holds {data_size} bytes of data where its header says {end}; it is cut off or padded")
    return ordered


def _entry(name: str, value: Any) -> TensorEntry:
    if len(name) > MAX_NAME:
        raise BadFile(f"the tensor name {_short(name)} is longer than any that is read ({MAX_NAME} characters)")
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        _, item_size = DTYPES[dtype]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise BadFile(f"the header describes tensor {_short(name)} in a way that safetensors does not know") from None
    whole = all(type(number) is int and 0 <= number < 2**48 for number in numbers) and len(shape) <= MAX_DIMENSIONS
    # Sides beside a 0 are bounded too: torch multiplies them.
    if not whole or math.prod(filter(None, shape)) >= 2**48 or end - begin != math.prod(shape) * item_size:
        raise BadFile(f"the size of tensor {_short(name)} does not match its shape")
    return TensorEntry(dtype, shape, begin, end)


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
