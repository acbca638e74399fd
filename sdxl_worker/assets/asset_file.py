"""What a reference was resolved to."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AssetFile:
    """A reference resolved to a checked local file.

    `name` is safe to show (the cache file name); `reference` is masked (no query, no token); `cached` is False when
    the file had to be downloaded for this request; `autov3` is what A1111, Forge and Civitai look a LoRA up by, ""
    where the sidecar does not say it.
    """

    path: Path
    name: str
    reference: str
    sha256: str
    size: int
    cached: bool = True
    autov3: str = ""
