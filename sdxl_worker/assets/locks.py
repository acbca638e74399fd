"""One downloader per file, as long as locks work; nobody waits for a dead one."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.folder import LOCKS, PARTIAL, make_folder

logger = logging.getLogger(__name__)

POLL_S = 0.1
# A holder whose partial file has not grown for this long is taken for dead, or for a lock that cannot be trusted.
PATIENCE_S = 20.0


@contextlib.contextmanager
def turn_to_download(path: Path, budget: Budget, is_ready: Callable[[], bool]) -> Iterator[None]:
    """Wait until nobody else is downloading `path`, it is ready, or the one who does makes no progress.

    Correctness does not depend on it: everyone who gets through looks again and publishes by rename.
    Raises FetchTimeout and Cancelled while waiting.
    """
    lock = _lock_for(path)
    held = False
    try:
        if lock is not None:
            held = _wait_for(lock, path, budget, is_ready)
        yield
    finally:
        if lock is not None and held:
            lock.release()


def _lock_for(path: Path) -> FileLock | None:
    folder = path.parent / LOCKS
    try:
        make_folder(folder)
    except OSError:
        return None
    # A soft lock left by a dead worker on another host would never be freed.
    return FileLock(folder / f"{path.name}.lock", fallback_to_soft=False)


def _wait_for(lock: FileLock, path: Path, budget: Budget, is_ready: Callable[[], bool]) -> bool:
    """True when the lock was taken, False when going on without it is better."""
    seen, since = "", time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            pass
        except (OSError, NotImplementedError):
            logger.info("this volume has no locks; %s may be downloaded more than once", path.name)
            return False
        else:
            return True
        if is_ready():
            return False
        growth = _growth(path)
        if growth != seen:
            seen, since = growth, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            logger.warning("whoever holds the lock of %s makes no progress; downloading it here too", path.name)
            return False
        budget.wait(POLL_S)


def _growth(path: Path) -> str:
    """Names and sizes of the partial files for `path`: changes as long as somebody is downloading it."""
    sizes = []
    with contextlib.suppress(OSError):
        for partial in (path.parent / PARTIAL).iterdir():
            if partial.name.startswith(path.name + "."):
                sizes.append(f"{partial.name}:{partial.stat().st_size}")
    return " ".join(sorted(sizes))
