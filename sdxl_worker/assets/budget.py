"""How long a download may take and who may stop it: one object that every wait and every chunk asks."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sdxl_worker.errors import Cancelled, FetchTimeout

TICK_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """A total deadline (seconds of time.monotonic) and the job's stop signal, shared by all steps of one download."""

    deadline: float
    seconds: float
    should_stop: Callable[[], bool] | None = None

    @classmethod
    def start(cls, seconds: float, should_stop: Callable[[], bool] | None = None) -> "Budget":
        """A budget of `seconds` from now."""
        return cls(time.monotonic() + seconds, seconds, should_stop)

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def is_stopped(self) -> bool:
        """True once the job was cancelled."""
        return self.should_stop is not None and self.should_stop()

    @property
    def is_over(self) -> bool:
        """True once there is nothing left to wait for."""
        return self.is_stopped or self.remaining == 0

    def verdict(self) -> Cancelled | FetchTimeout | None:
        """Why the download has to end now, or None."""
        if self.is_stopped:
            return Cancelled("the job was stopped during a download")
        if self.remaining == 0:
            return FetchTimeout(f"the download did not end within {self.seconds:g} seconds")
        return None

    def check(self) -> None:
        """Raises Cancelled or FetchTimeout when the download has to end."""
        if (verdict := self.verdict()) is not None:
            raise verdict

    def wait(self, seconds: float) -> None:
        """Sleep in short steps; raises Cancelled or FetchTimeout as soon as that is due."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(TICK_S, left))
            self.check()


def run_within(budget: Budget, work: Callable[[], T]) -> T:
    """`work()` in a thread that is left behind when the budget ends first, for calls that nothing can interrupt."""
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="bounded-call", daemon=True).start()
    while not done.wait(TICK_S):
        budget.check()
    if errors:
        raise errors[0]
    return results[0]
