"""Work beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """The future of `work()`, which a thread of its own does; a process that ends does not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits for the future has to hear of it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
