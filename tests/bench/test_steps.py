"""bench.steps on the tiny model: whole figures, in the places where bench.gpu looks for them."""

from __future__ import annotations

import argparse
from typing import Any

from bench.gpu.figures import chosen
from bench.steps import run_on


def test_figures_are_whole(pipeline: Any):
    (figure,) = chosen(["steps"])
    found = run_on(pipeline, argparse.Namespace(size=64, steps=2, repeats=1, samplers=["K_EULER", "UniPC"]))
    assert all(goal.value(found) for goal in figure.goals)
    # On the CPU both ways are the same, and nothing waits.
    for row in found["samplers"].values():
        assert (row["largest_difference"], row["waits"]) == (0, {"ours": None, "stock": None})
    assert found["previews"]["none"]["made"] == 0
    assert 1 <= found["previews"]["colours"]["made"] <= 2
    assert 1 <= found["previews"]["vae"]["made"] <= 2
