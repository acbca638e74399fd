"""A short soak; `python -m tests.soak` runs longer ones."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.soak.kinds import Kind
from tests.soak.run import rounds_of, soak

JOBS = 30


def test_a_short_soak(tmp_path: Path) -> None:
    report = soak(JOBS, 1, tmp_path)
    assert report.broken == []
    assert report.jobs == JOBS
    assert report.repeats > JOBS // 4
    assert {"drawn", "stopped", "INVALID_INPUT"} < set(report.outcomes)


def test_every_round_has_the_same_kinds() -> None:
    every = [Kind(f"kind {index}", {}) for index in range(7)]
    first, second, third = rounds_of(every, 18, Random(1))
    assert sorted(kind.name for kind in first) == sorted(kind.name for kind in second) == [kind.name for kind in every]
    assert len(third) == 4
    assert [len(of_round) for of_round in rounds_of(every, 6, Random(1))] == [3, 3]
