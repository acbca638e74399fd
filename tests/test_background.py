"""Work in a thread of its own gives its result, or its error, to whoever waits."""

from __future__ import annotations

import threading

import pytest

from sdxl_worker.background import in_background


def test_the_result_comes_from_another_thread():
    future = in_background(lambda: threading.current_thread().name, "at work")
    assert future.result(timeout=60) == "at work"


def test_an_error_reaches_whoever_waits():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0, "at work").result(timeout=60)
