"""The sidecar: a small JSON file beside a cached file, which says what the file is and when it was last used."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdxl_worker.text import is_clean

SUFFIX = ".json"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """What is known about one cached file. `key` is the whole hash of its canonical reference ("" = by hand),
    `identity` what a moving reference resolved to, `checked_at` when it last did (seconds since 1970). `source_sha256`
    is that of the file at its source where `sha256`, that of the cached file, is another; `source_size` and
    `source_mtime_ns` are the state of the pickle that an operator put there and the file was converted from."""

    reference: str
    size: int
    mtime_ns: int
    sha256: str
    key: str = ""
    format: str = ""
    base_model: str = ""
    fetched_at: str = ""
    identity: str = ""
    checked_at: float = 0.0
    source_sha256: str = ""
    source_size: int = 0
    source_mtime_ns: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        return not self.key


def sidecar_path(path: Path) -> Path:
    """Where the facts about `path` are kept."""
    return path.with_name(path.name + SUFFIX)


def read_sidecar(path: Path) -> tuple[Sidecar, float] | None:
    """The sidecar of the file `path` and when it was last used (seconds since 1970); None without a readable one."""
    try:
        # Not blocking: whatever lies there, a pipe for example, must not hold the worker up.
        handle = os.open(sidecar_path(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                return None
            content = json.loads(os.read(handle, min(found.st_size, MAX_BYTES)))
        finally:
            os.close(handle)
        return _from_json(content), found.st_mtime
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _from_json(content: Any) -> Sidecar:
    """Raises TypeError or ValueError for what no worker wrote."""
    values = {}
    for entry in fields(Sidecar):
        if entry.name not in content:
            continue
        value = content[entry.name]
        if not isinstance(value, _TYPES[str(entry.type)]) or isinstance(value, bool):
            raise TypeError(entry.name)
        if isinstance(value, str) and not is_clean(value):
            raise ValueError(entry.name)
        values[entry.name] = value
    return Sidecar(**values)


_TYPES: Mapping[str, Any] = {"str": str, "int": int, "float": (int, float), "Mapping[str, Any]": dict}


def fields_from(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar fields that a file's facts fill, and the time of day."""
    return {
        "format": str(facts.get("format", "")),
        "base_model": str(facts.get("base_model", "")),
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "facts": dict(facts),
    }
