"""The bytes of a repo on their way, told to whoever shows them instead of drawn by the Hub client."""

import threading
from collections.abc import Callable
from typing import Any

# snapshot_download() makes three bars; this is the name of the one that counts bytes written.
BYTES_BAR = "huggingface_hub.snapshot_download"


def reporting_bar(on_progress: Callable[[int, int | None], None], done: int, total: int) -> Any:
    """A class for snapshot_download's `tqdm_class` that draws nothing and calls `on_progress(bytes, total bytes)`.

    Starts at `done` of `total` bytes. The files are fetched by several threads.
    """
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Reporting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._counts = options.get("name") == BYTES_BAR
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self._counts:
                with lock:
                    done += int(n or 0)
                    on_progress(min(done, total), total)

    return Reporting
