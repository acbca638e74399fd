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

    `name` is what sentences call it; `folder` and `max_bytes` come from the settings; `check(path)` gives the
    JSON-ready facts of a safetensors file or raises AssetFileError; `codes` names the public codes of errors that
    are this kind's own, where they differ from the error class's.
    """

    name: str
    suffixes: tuple[str, ...]
    folder: Callable[[Settings], Path]
    max_bytes: Callable[[Settings], int]
    check: Callable[[Path], Mapping[str, Any]]
    codes: Mapping[type[WorkerError], str]

    @contextlib.contextmanager
    def own_codes(self) -> Iterator[None]:
        """Errors that leave here carry this kind's codes."""
        try:
            yield
        except WorkerError as error:
            error.code = self.codes.get(type(error), error.code)
            raise
