"""The LoRA cache folder: a file under its final name is whole and checked, and says beside it what it is.

    <folder>/<name>.safetensors         the file; appears by one atomic rename
    <folder>/<name>.safetensors.json    its sidecar; its modification time is when the file was last used
    <folder>/.partial/                  files that are being written, named after their writer
    <folder>/.locks/                    locks, which only save bandwidth
    <folder>/.quarantine/               files that turned out to be damaged

A file without a sidecar, or whose sidecar says so, was put there by hand: it is checked when first asked for, and never
removed.
"""

import contextlib
import json
import logging
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from sdxl_worker.assets.owner import is_left_over, owner_tag
from sdxl_worker.errors import CacheWriteError

logger = logging.getLogger(__name__)

PARTIAL, LOCKS, QUARANTINE = ".partial", ".locks", ".quarantine"
SIDECAR_SUFFIX = ".json"
MAX_SIDECAR = 1 << 20
# A use is noted at most this often, which keeps a hit cheap on a network volume.
TOUCH_INTERVAL_S = 30.0

# (path, size, mtime_ns) of files whose sidecar could not be written.
_unwritten: "dict[tuple[str, int, int], Sidecar]" = {}
_held: Counter[str] = Counter()
_held_lock = Lock()


@dataclass(frozen=True)
class Sidecar:
    """What is known about one cached file. `key` is the whole hash of its canonical reference ("" = by hand),
    `identity` what a moving reference resolved to, `checked_at` when it last did (seconds since 1970), `source_*` the
    state of the pickle that the file was converted from."""

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
    source_size: int = 0
    source_mtime_ns: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        return not self.key


@dataclass(frozen=True)
class Entry:
    """A cached file and its sidecar, as found together."""

    path: Path
    sidecar: Sidecar


def sidecar_path(path: Path) -> Path:
    """Where the facts about `path` are kept."""
    return path.with_name(path.name + SIDECAR_SUFFIX)


def read_sidecar(path: Path) -> tuple[Sidecar, float] | None:
    """The sidecar of the file `path` and when it was last used (seconds since 1970); None without a readable one."""
    try:
        handle = os.open(sidecar_path(path), os.O_RDONLY)
        try:
            found = os.fstat(handle)
            content = json.loads(os.read(handle, min(found.st_size, MAX_SIDECAR)))
        finally:
            os.close(handle)
        known = {name: content[name] for name in Sidecar.__dataclass_fields__ if name in content}
        return Sidecar(**known), found.st_mtime
    except (OSError, ValueError, TypeError, KeyError):
        return None


def look_up(path: Path, key: str) -> Entry | None:
    """The entry at `path` when file and sidecar agree in size, time and reference; five system calls, no reading."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    remembered = _unwritten.get((str(path), found.st_size, found.st_mtime_ns))
    read = (remembered, time.time()) if remembered is not None else read_sidecar(path)
    if read is None or not stat.S_ISREG(found.st_mode):
        return None
    sidecar, used_at = read
    if (sidecar.size, sidecar.mtime_ns, sidecar.key) != (found.st_size, found.st_mtime_ns, key):
        return None
    _touch(path, used_at)
    return Entry(path, sidecar)


def _touch(path: Path, used_at: float) -> None:
    if abs(time.time() - used_at) > TOUCH_INTERVAL_S:
        # A read-only volume serves its files all the same.
        with contextlib.suppress(OSError):
            os.utime(sidecar_path(path))


def write_sidecar(path: Path, sidecar: Sidecar) -> Entry:
    """Put `sidecar` beside `path`; where that is impossible (a read-only volume) this process remembers it."""
    target = sidecar_path(path)
    content = json.dumps(asdict(sidecar), indent=1, allow_nan=False)
    try:
        with temporary_file(path.parent, target.name) as (temporary, handle):
            handle.write(content.encode())
            os.replace(temporary, target)
    except (OSError, CacheWriteError):
        logger.warning("no sidecar can be written for %s; it is remembered by this worker only", path.name)
        _unwritten[str(path), sidecar.size, sidecar.mtime_ns] = sidecar
    return Entry(path, sidecar)


@contextlib.contextmanager
def temporary_file(folder: Path, final_name: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new unbuffered file on the volume of `folder`, removed at the end unless it was renamed; CacheWriteError."""
    path = folder / PARTIAL / f"{final_name}.{owner_tag()}~{secrets.token_hex(4)}.part"
    try:
        make_folder(path.parent)
        handle = path.open("xb", buffering=0)
    except OSError as error:
        raise CacheWriteError(f"the LoRA cache cannot be written ({error.strerror or 'I/O error'})") from error
    try:
        with handle:
            yield path, handle
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def publish(temporary: Path, final: Path, sidecar: Sidecar) -> Entry:
    """Rename the whole, checked and synced `temporary` to `final`, then tell about it; raises CacheWriteError."""
    try:
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
        found = final.stat()
    except OSError as error:
        raise CacheWriteError(f"the LoRA cache cannot be written ({error.strerror or 'I/O error'})") from error
    return write_sidecar(final, replace(sidecar, size=found.st_size, mtime_ns=found.st_mtime_ns))


def quarantine(path: Path) -> None:
    """Take a damaged file out of the cache, and keep it for whoever wants to know why."""
    logger.warning("%s is damaged; it is moved to %s", path.name, QUARANTINE)
    target = path.parent / QUARANTINE / path.name
    with contextlib.suppress(OSError):
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for leftover in (path, sidecar_path(path)):
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def in_use(paths: Iterable[Path]) -> Iterator[None]:
    """Keep this worker from evicting `paths` for as long as a job needs them; other workers see them as just used."""
    names = [str(path) for path in paths]
    for name in names:
        with contextlib.suppress(OSError):
            os.utime(sidecar_path(Path(name)))
    with _held_lock:
        _held.update(names)
    try:
        yield
    finally:
        with _held_lock:
            _held.subtract(names)


def is_held(path: Path) -> bool:
    """True while a job of this worker is inside `in_use` with this path."""
    with _held_lock:
        return _held[str(path)] > 0


def prepare_folder(folder: Path, *, download_timeout: float) -> None:
    """Create the cache folder and remove what dead workers left behind; a read-only volume is only logged.

    Called when the worker starts. `download_timeout` (seconds) tells how old another worker's file has to be.
    """
    try:
        make_folder(folder)
    except OSError:
        logger.warning("the LoRA cache folder %s cannot be created; LoRAs go to temporary space", folder)
        return
    for partial in _entries(folder / PARTIAL):
        if is_left_over(partial, older_than_s=download_timeout + 60):
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
                logger.info("removed %s, which an earlier worker left behind", partial.name)
    for lock in _entries(folder / LOCKS):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > 86400:
                lock.unlink(missing_ok=True)
    _remove_orphans(folder)


def _remove_orphans(folder: Path) -> None:
    """Sidecars whose file is gone, found with one listing: a volume may hold thousands."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if not name.endswith(f".safetensors{SIDECAR_SUFFIX}") or name.removesuffix(SIDECAR_SUFFIX) in names:
            continue
        # Not a fresh one, whose file another worker may have renamed since the listing.
        if is_left_over(folder / name, older_than_s=60):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create `folder` where its links lead: /models points to a folder of the volume that nobody has created yet."""
    os.makedirs(os.path.realpath(folder), exist_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []
