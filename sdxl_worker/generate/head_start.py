"""What can be done about the base model while the libraries that load it are still being imported. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from sdxl_worker.background import in_background
from sdxl_worker.generate.base_model import BaseModel, base_model_here
from sdxl_worker.generate.model_hash import start_hashing
from sdxl_worker.generate.model_repo import needed_files
from sdxl_worker.settings import Settings

_CHUNK = 16 * 2**20


class HeadStart:
    """Reads the weights of a base model that is on this disk, and makes its hash, each in a thread of its own.

    Mapped files come in small pieces, each waited for; a disk or a network volume gives whole files much faster.
    Nothing here can fail: a file that cannot be read is left to whoever loads it.
    """

    def __init__(self, settings: Settings) -> None:
        self._hash: Future[str] | None = None
        self._model = base_model_here(settings)
        if self._model is not None and self._model.path is not None:
            self._hash = start_hashing(self._model, None)
            paths = weight_files(self._model)
            in_background(lambda: _read(paths), "read ahead")

    def hash_of(self, model: BaseModel) -> Future[str] | None:
        """The hash of `model`; None where this is about another one."""
        return self._hash if model == self._model else None


def weight_files(model: BaseModel) -> list[Path]:
    """The files with the base model's weights, in the order in which diffusers loads the components."""
    if model.path is None:
        return []
    if model.kind == "file":
        return [model.path]
    names = [path.relative_to(model.path).as_posix() for path in model.path.rglob("*") if path.is_file()]
    return [model.path / name for name in needed_files(names) if name.endswith((".safetensors", ".bin"))]


def _read(paths: Sequence[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
