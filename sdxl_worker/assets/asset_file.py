"""What a reference was resolved to."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AssetFile:
    """A reference resolved to a checked local file.

    `name` is safe to show (the cache file name); `reference` is masked (no query, no token); `cached` is False when
    the file had to be downloaded for this request. `sha256` is that of the local file, `source_sha256` that of the file
    at its source: another one where the worker keeps a converted copy. `autov3` is what A1111, Forge and Civitai look
    a LoRA up by, "" where the sidecar does not say it. `origin` is the masked reference that it was first fetched
    by, even where this one is its name in the cache.
    """

    path: Path
    name: str
    reference: str
    sha256: str
    size: int
    cached: bool = True
    source_sha256: str = ""
    autov3: str = ""
    origin: str = ""
