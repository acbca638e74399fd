"""What makes a kind of asset: how its files are checked, where they are kept, which codes its errors carry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.errors import WorkerError
from sdxl_worker.settings import Settings


@dataclass(frozen=True)
class Kind:
    """One kind of file that references lead to. The kinds there are stand in `sdxl_worker.kinds`.

    `name` is what sentences call it; `sources` are the names of the sources that its references may lead to
    (`assets.sources.SOURCES`; None: all of them); `codes` names the public codes of errors that are this kind's own,
    where they differ from the error class's.

    `folder` is where files are kept (None: nowhere, they are read into memory), `cache_limit` how many bytes the
    worker's own files there may take together (0: no limit). `max_bytes` bounds one file, `timeout_s` one download.
    `check(path)` gives the JSON-ready facts of a safetensors file or raises AssetFileError; a kind with `.pt` among
    its `suffixes` takes pickles too, which are converted. Kinds may share a folder: `knows(format)` says whether a file
    that was checked before, and whose facts name that format, passed this kind's check. `usual_file` is the file that
    a Hub repo is taken to mean.

    `is_operators` says that a setting of the worker names the file and not a request: its host may be in a private
    network, and what was fetched once is kept as it is, though its reference may move.
    """

    name: str
    suffixes: tuple[str, ...]
    max_bytes: Callable[[Settings], int]
    timeout_s: Callable[[Settings], float]
    codes: Mapping[type[WorkerError], str]
    sources: tuple[str, ...] | None = None
    folder: Callable[[Settings], Path] | None = None
    cache_limit: Callable[[Settings], float] = lambda _: 0.0
    check: Callable[[Path], Mapping[str, Any]] = lambda _: {}
    knows: Callable[[str], bool] = lambda _: True
    usual_file: str = "pytorch_lora_weights.safetensors"
    is_operators: bool = False

    def folder_in(self, settings: Settings) -> Path:
        """Where files of this kind are kept; ValueError for a kind that is kept nowhere."""
        if self.folder is None:
            raise ValueError(f"a {self.name} is not kept in any folder")
        return self.folder(settings)

    def may_come_from(self, source: str) -> bool:
        """True when references of this kind may lead to that source."""
        return self.sources is None or source in self.sources

    @property
    def takes_pickles(self) -> bool:
        """True when `.pt` and `.bin` files are taken, and converted."""
        return ".pt" in self.suffixes

    @contextlib.contextmanager
    def own_codes(self) -> Iterator[None]:
        """Errors that leave here carry this kind's codes."""
        try:
            yield
        except WorkerError as error:
            error.code = self.codes.get(type(error), error.code)
            raise
