"""The first hostile cases of each kind: a known code or a picture, in bounded time and memory, and no change after."""

from __future__ import annotations

import pytest

from tests.hostile.arena import Arena

SEED = 1
# As many as half a minute on one core allows; `python -m tests.hostile` runs more.
CASES = {"requests": 150, "loras": 100, "pictures": 80, "masks": 60, "servers": 60}
FEW = 10


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory):
    with Arena(tmp_path_factory.mktemp("hostile"), pickles=0) as arena:
        yield arena


@pytest.mark.parametrize(
    ("family", "first"), [(family, first) for family in Arena.FAMILIES for first in range(0, CASES[family], FEW)]
)
def test_hostile_input(arena: Arena, family: str, first: int) -> None:
    results = [arena.run(SEED, family, index) for index in range(first, first + FEW)]
    assert [(result.index, result.what, result.broken) for result in results if result.broken] == []
    assert arena.check_usable() == []
