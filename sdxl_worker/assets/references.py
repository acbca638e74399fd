"""What a reference is: a text from a request, read by one of the sources, with its name in the cache."""

from __future__ import annotations

import abc
import hashlib
import re
from typing import TYPE_CHECKING

from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from sdxl_worker.assets.budget import Budget
    from sdxl_worker.assets.location import Location

# .pti is what cog-sdxl calls a safetensors file of embeddings.
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pti")
MAX_REFERENCE = 4096
MAX_PART = 200  # leaves room for the hash and the suffixes below the usual limit of 255 bytes


class Reference(abc.ABC):
    """What a text means to one source: a frozen dataclass that tells any two files apart by `canonical`."""

    @property
    @abc.abstractmethod
    def canonical(self) -> str:
        """The same text for every way to name the same file; for hashing only, since it may hold a token."""

    @property
    @abc.abstractmethod
    def shown(self) -> str:
        """What may be shown and logged."""

    @property
    @abc.abstractmethod
    def file_name(self) -> str:
        """The file's name in the cache."""

    @property
    def is_moving(self) -> bool:
        """True when the same reference may mean another file tomorrow."""
        return False

    @property
    def key(self) -> str:
        """The whole sha256 of `canonical`: tells apart two references whose short hashes agree."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


class RemoteReference(Reference):
    """A reference to a file on another host."""

    @abc.abstractmethod
    def locate(self, settings: Settings, budget: Budget) -> Location:
        """Where the file's bytes are right now; raises FetchError subclasses and Cancelled."""


def hashed_name(canonical: str, readable: str) -> str:
    """`<12 hex>_<name>.safetensors`, or `lora_<12 hex>.safetensors` when `readable` is not a weight file's name."""
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    stem, dot, suffix = readable.rpartition(".")
    safe = re.sub(r"[^A-Za-z0-9._\-]+", "_", stem).strip("._")[:80]  # for ever: files are found by it
    if not dot or f".{suffix.lower()}" not in WEIGHT_SUFFIXES or not safe:
        return f"lora_{digest}.safetensors"
    return f"{digest}_{safe}.safetensors"
