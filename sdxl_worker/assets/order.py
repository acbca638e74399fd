"""What `AssetStore.get` was asked for, on its way through the modules that see to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.cache import Cache
from sdxl_worker.assets.fetch import Progress
from sdxl_worker.assets.kind import Kind
from sdxl_worker.settings import Settings


@dataclass(frozen=True)
class Order:
    """The kind of file, the settings, the cache that the file goes into, the time it may take, whom to tell."""

    kind: Kind
    settings: Settings
    cache: Cache
    budget: Budget
    on_progress: Progress | None = None

    @property
    def folder(self) -> Path:
        """Where files of this kind are kept."""
        return self.kind.folder_in(self.settings)
