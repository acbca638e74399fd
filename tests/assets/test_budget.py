"""How long a download may take, and who may stop it."""

from __future__ import annotations

import threading
import time

import pytest

from sdxl_worker.assets.budget import Budget, run_within
from sdxl_worker.errors import Cancelled, FetchTimeout


def over(seconds: float) -> Budget:
    """A budget of `seconds` that ended a moment ago."""
    return Budget(time.monotonic() - 1, seconds)


def test_a_budget_ends_by_its_deadline_or_by_the_job_s_stop():
    fresh = Budget.start(600)
    fresh.check()
    assert (fresh.is_over, fresh.verdict()) == (False, None)
    assert 0 < fresh.remaining <= 600
    with pytest.raises(FetchTimeout, match="within 5 seconds"):
        over(5).check()
    assert over(5).remaining == 0
    with pytest.raises(Cancelled):
        Budget.start(600, lambda: True).check()


def test_a_stop_counts_before_the_deadline():
    assert isinstance(Budget(time.monotonic() - 1, 5, lambda: True).verdict(), Cancelled)


def test_waiting_ends_with_the_stop():
    asked = iter([False, False, True])
    with pytest.raises(Cancelled):
        Budget.start(600, lambda: next(asked)).wait(600)


def test_work_gives_its_value_or_raises_its_error():
    assert run_within(Budget.start(600), lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        run_within(Budget.start(600), lambda: 1 / 0)


def test_work_that_does_not_end_is_left_behind():
    release, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(600)

    with pytest.raises(Cancelled):
        run_within(Budget.start(600, begun.is_set), work)
    release.set()
