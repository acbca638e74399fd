"""A safetensors file before it is written, free to contradict itself."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

# Name in a header -> bytes per element.
DTYPES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


OFFSETS: tuple[Any, ...] = (
    *([0, 0], [0, 64], [64, 68], [4, 0], [-4, 0], [0.0, 4.0], [0, 2**63], [0, 10**30], ["0", "4"], [0], None),
    [0, 4, 8],
)
NO_HEADERS = (b"[]", b"{}", b"null", b"", b"{" * 100_000, b"[" * 100_000, b"\xff\xfe{}", b'{"a":' * 50_000, b"NaN")


@dataclass
class Tensor:
    """One entry of a file, free to contradict itself: `data` need not fit `dtype` and `shape`."""

    dtype: Any
    shape: Any
    data: bytes


@dataclass
class Draft:
    """A file before it is written: tensors by name, metadata, and a last change of the header or of the bytes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """The header with offsets in the order of the tensors."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for name, tensor in self.tensors.items():
            begin, end = end, end + len(tensor.data)
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        return header

    def data(self) -> bytes:
        """All tensors' bytes."""
        return b"".join(tensor.data for tensor in self.tensors.values())

    def write(self) -> bytes:
        """The file as a writer would make it who believes what the draft says."""
        return assembled(json.dumps(self.header()).encode(), self.data())


def assembled(header: bytes, data: bytes) -> bytes:
    """Length, header, data: https://github.com/huggingface/safetensors#format."""
    return struct.pack("<Q", len(header)) + header + data


def zeros(shape: Any, dtype: Any) -> bytes:
    """As many zero bytes as the shape asks for, as long as that is a small file."""
    try:
        size = int(math.prod(shape) * DTYPES[dtype])
    except (TypeError, KeyError, ValueError):
        return bytes(64)
    return bytes(size) if 0 <= size <= 4_000_000 else bytes(64)


def entry_of(tensor: torch.Tensor) -> Tensor:
    """An honest entry, in float32."""
    return Tensor("F32", list(tensor.shape), tensor.float().contiguous().numpy().tobytes())


def wrong_header(random: Random, draft: Draft) -> bytes:
    """The draft as a file whose header lies or cannot be read."""
    header, data = draft.header(), draft.data()
    # A draft may hold just a tensor that is called so.
    name = random.choice([key for key in header if key != "__metadata__"] or list(header))
    entry, size = header[name], len(data)
    change = random.randrange(12)
    if change < 4:
        entry["data_offsets"] = random.choice(OFFSETS)
    elif change == 4:
        header[name] = random.choice((None, 3, [], "x", {}, {"dtype": "F32"}, {**entry, "extra": 1}))
    elif change == 5:
        header["gap"] = {"dtype": "U8", "shape": [4], "data_offsets": [size + 100, size + 104]}
    elif change == 6:
        header["__metadata__"] = random.choice((None, 3, [], "x", {"a": {"b": 1}}))
    text = json.dumps(header).encode()
    if change == 7:
        text = random.choice(NO_HEADERS)
    elif change == 8:
        text = text[:-1] + b"," + text[1:]
    elif change == 9:
        text += b" " * random.choice((1, 10_000_000, 17_000_000))
    content = assembled(text, data)
    if change >= 10:
        length = random.choice((0, 1, len(text) - 1, len(text) + 1, len(content), 2**31, 2**63, 2**64 - 1))
        content = struct.pack("<Q", length) + content[8:]
    return content
