"""The device serves one job at a time, in order of arrival."""

import threading

import pytest

from sdxl_worker.errors import Cancelled
from sdxl_worker.serving.turns import Turns


def test_tickets_are_served_in_order_of_arrival_whoever_asks_first():
    turns = Turns()
    tickets = [turns.ticket() for _ in range(8)]
    served = []

    def use(index: int) -> None:
        tickets[index].wait()
        served.append(index)
        tickets[index].leave()

    threads = [threading.Thread(target=use, args=(index,)) for index in reversed(range(8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert served == list(range(8))


def test_leaving_unused_and_leaving_twice():
    turns = Turns()
    first, second, third = turns.ticket(), turns.ticket(), turns.ticket()
    assert first.is_first
    assert not second.is_first
    second.leave()
    second.leave()
    first.leave()
    third.wait()
    assert third.is_first


def test_waiting_can_be_stopped():
    turns = Turns()
    first, second = turns.ticket(), turns.ticket()

    def stop() -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        second.wait(stop)
    assert first.is_first
