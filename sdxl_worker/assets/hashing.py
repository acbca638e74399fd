"""sha256 beside the transfer: large chunks are hashed while the next one is being received."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

# Below this a thread costs more than it saves.
WORTH_A_THREAD = 256 << 10


class BackgroundSha256:
    """Like hashlib.sha256, but `update` returns before a large chunk is hashed; at most one chunk is under way.

    hashlib and the socket both release the interpreter lock. A context manager, for the thread's sake.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def update(self, chunk: bytes) -> None:
        """Hash `chunk`, which must not change any more."""
        self._wait()
        if len(chunk) < WORTH_A_THREAD:
            self._digest.update(chunk)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._running = self._pool.submit(self._digest.update, chunk)

    def hexdigest(self) -> str:
        """The digest of everything so far."""
        self._wait()
        return self._digest.hexdigest()

    def restart(self) -> None:
        """Forget everything so far."""
        self._wait()
        self._digest = hashlib.sha256()

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def __enter__(self) -> "BackgroundSha256":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
