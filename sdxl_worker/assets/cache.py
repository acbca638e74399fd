"""The cache: a file under its final name is whole and checked, and its sidecar says what it is.

A file without a sidecar, or whose sidecar says so, was put there by hand: it is checked when first asked for, and never
removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from sdxl_worker.assets.folder import not_written, quarantine, temporary_file
from sdxl_worker.assets.sidecar import Sidecar, read_sidecar, sidecar_path
from sdxl_worker.errors import CacheWriteError

logger = logging.getLogger(__name__)

# A use is noted at most this often, which keeps a hit cheap on a network volume.
TOUCH_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Entry:
    """A cached file and its sidecar, as found together."""

    path: Path
    sidecar: Sidecar


class Cache:
    """What one process knows about its cache folders beyond what lies in them.

    `check_turn` is held while a file is checked that nobody has asked for yet: the check takes as much memory as the
    file, and several jobs may want the same one.
    """

    def __init__(self) -> None:
        self.check_turn = Lock()
        # (path, size, mtime_ns) of files whose sidecar could not be written.
        self._unwritten: dict[tuple[str, int, int], Sidecar] = {}
        # The same of files that are damaged and cannot be taken out of their folder.
        self._damaged: set[tuple[str, int, int]] = set()
        self._held: Counter[str] = Counter()
        self._held_lock = Lock()

    def look_up(self, path: Path, key: str, *, any_time: bool = False) -> Entry | None:
        """The entry at `path` when file and sidecar agree in size, time and reference; five system calls, no reading.

        `any_time` leaves the time out: an image's layers, for example, do not keep it.
        """
        try:
            found = os.lstat(path)
        except OSError:
            return None
        state = (str(path), found.st_size, found.st_mtime_ns)
        if state in self._damaged:
            return None
        remembered = self._unwritten.get(state)
        read = (remembered, time.time()) if remembered is not None else read_sidecar(path)
        if read is None or not stat.S_ISREG(found.st_mode):
            return None
        sidecar, used_at = read
        mtime_ns = sidecar.mtime_ns if any_time else found.st_mtime_ns
        if (sidecar.size, sidecar.mtime_ns, sidecar.key) != (found.st_size, mtime_ns, key):
            return None
        _touch(path, used_at)
        return Entry(path, sidecar)

    def write_sidecar(self, path: Path, sidecar: Sidecar) -> Entry:
        """Put `sidecar` beside `path`; where that is impossible (a read-only volume) this object remembers it."""
        target = sidecar_path(path)
        content = json.dumps(asdict(sidecar), indent=1, allow_nan=False)
        try:
            with temporary_file(path.parent, target.name) as (temporary, handle):
                handle.write(content.encode())
                os.replace(temporary, target)
        except (OSError, CacheWriteError):
            logger.warning("no sidecar can be written for %s; it is remembered by this worker only", path.name)
            self._unwritten[str(path), sidecar.size, sidecar.mtime_ns] = sidecar
        return Entry(path, sidecar)

    def publish(self, temporary: Path, final: Path, sidecar: Sidecar) -> Entry:
        """Rename the whole, checked and synced `temporary` to `final`, then tell about it; raises CacheWriteError."""
        try:
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, final)
            found = final.stat()
        except OSError as error:
            raise not_written(error) from error
        return self.write_sidecar(final, replace(sidecar, size=found.st_size, mtime_ns=found.st_mtime_ns))

    def set_aside(self, path: Path) -> None:
        """Put a damaged file into quarantine; where that is impossible (a read-only volume) it is not used again."""
        quarantine(path)
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            self._damaged.add((str(path), found.st_size, found.st_mtime_ns))

    @contextlib.contextmanager
    def in_use(self, paths: Iterable[Path]) -> Iterator[None]:
        """Keep this worker from evicting `paths` meanwhile; other workers see them as just used."""
        names = [str(path) for path in paths]
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(sidecar_path(Path(name)))
        with self._held_lock:
            self._held.update(names)
        try:
            yield
        finally:
            with self._held_lock:
                self._held.subtract(names)

    def is_held(self, path: Path) -> bool:
        """True while a job of this worker is inside `in_use` with this path."""
        with self._held_lock:
            return self._held[str(path)] > 0


def _touch(path: Path, used_at: float) -> None:
    if abs(time.time() - used_at) > TOUCH_INTERVAL_S:
        # A read-only volume serves its files all the same.
        with contextlib.suppress(OSError):
            os.utime(sidecar_path(path))
