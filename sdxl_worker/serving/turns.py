"""One job at a time on the device, in the order in which the jobs arrived."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

# How often a waiting job looks whether it was cancelled.
POLL_SECONDS = 0.1


class Turns:
    """A queue of tickets; only the oldest ticket that has not left may use the device."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Ticket] = deque()

    def ticket(self) -> Ticket:
        """Join the queue. Every ticket has to leave, whether it had its turn or not."""
        with self._changed:
            ticket = Ticket(self)
            self._queue.append(ticket)
            return ticket

    def is_first(self, ticket: Ticket) -> bool:
        """True when it is this ticket's turn."""
        with self._changed:
            return self._queue[0] is ticket

    def wait(self, ticket: Ticket, check_stop: Callable[[], None]) -> None:
        """Return when all earlier tickets have left; `check_stop` may raise meanwhile."""
        with self._changed:
            while self._queue[0] is not ticket:
                check_stop()
                self._changed.wait(POLL_SECONDS)

    def leave(self, ticket: Ticket) -> None:
        """Let the next one pass; leaving twice does no harm."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._changed.notify_all()


class Ticket:
    """A place in the queue."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    @property
    def is_first(self) -> bool:
        """True when it is this ticket's turn."""
        return self._turns.is_first(self)

    def wait(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Return when all earlier tickets have left; `check_stop` may raise meanwhile."""
        self._turns.wait(self, check_stop)

    def leave(self) -> None:
        """Let the next one pass; leaving twice does no harm."""
        self._turns.leave(self)
