"""The table of `bench.rendering`: each setting's speed and picture against the baseline's of the same round."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.compiled_state import Compiled, State, graphs
from bench.instruments import Clock, spread
from bench.worker_sdxl import bare, difference, request_of
from sdxl_worker.generate import attention
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest

BASELINE = "worker-sdxl's set-up"
OTHER_PROMPT = "an old tree in the snow"
# What COMPILE=1 is meant to reach at 1024 x 1024 and 28 steps.
GOAL_RATIO, GOAL_DIFFERENCE = 1.8, 2

# Fields of the request that give speed for another picture; those that this version does not have are left out.
OPT_INS: tuple[Mapping[str, Any], ...] = ({"cfg_end": 0.8}, {"cfg_end": 0.6}, {"deep_cache": 2}, {"deep_cache": 3})

HEADER = ("setting", "pictures / s", "speed", "least - most", "max of 255", "mean of 255", "pixels that differ")


@dataclass(frozen=True)
class Row:
    """One setting: the state of the pipeline around the drawing, and the request's fields that differ."""

    name: str
    state: State = contextlib.nullcontext
    fields: Mapping[str, Any] = field(default_factory=dict)
    draws: Callable[[Any, GenerationRequest], Any] = lambda *made: render(*made)[0]
    once: bool = False


def rows_for(pipeline: Any, compiled: Compiled) -> list[Row]:
    """What can be measured with this device and this version of the request; the baseline comes first."""
    kernels = [name for name in attention.KERNELS if attention.usable(name, pipeline.device, pipeline.unet.dtype)]
    rows = [
        Row(BASELINE, draws=bare),
        Row("this worker as it comes"),
        Row("channels_last", compiled.layout.entered),
        Row("COMPILE=1", compiled.entered),
        *(Row(f"ATTENTION={name}", functools.partial(attention.chosen, name), once=name == "math") for name in kernels),
    ]
    known = {entry.name for entry in dataclasses.fields(GenerationRequest)}
    for fields in OPT_INS:
        if fields.keys() <= known:
            named = ", ".join(f"{name}={value}" for name, value in fields.items())
            rows += [
                Row(named, fields=fields, once=True),
                Row(f"COMPILE=1, {named}", compiled.entered, fields, once=True),
            ]
    return rows


class Rounds:
    """Draws rows, times them, and keeps the pictures; a row that fails says why and stops no other."""

    def __init__(self, pipeline: Any, options: argparse.Namespace) -> None:
        self._pipeline, self._options, self._clock = pipeline, options, Clock(pipeline.device.type)
        self.pictures: dict[str, np.ndarray] = {}
        self.seconds: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def draw(self, row: Row, **fields: Any) -> np.ndarray:
        """The picture of `row` as int (height, width, 3)."""
        request = request_of(self._options, **row.fields, **fields)
        return np.asarray(row.draws(self._pipeline, request)).astype(int)

    def first(self, row: Row) -> None:
        """Not timed: what is compiled, chosen or allocated the first time."""
        self._try(row, lambda: self.pictures.update({row.name: self.draw(row)}))

    def again(self, row: Row) -> None:
        """Timed."""
        times = self.seconds.setdefault(row.name, [])
        self._try(row, lambda: times.append(self._clock.time(lambda: self.draw(row))))

    def _try(self, row: Row, action: Callable[[], None]) -> None:
        if row.name in self.failed:
            return
        try:
            with row.state():
                action()
        except Exception as error:
            self.failed[row.name] = f"{type(error).__name__}: {error}"[:500]
            sys.stderr.write(f"{row.name}: {self.failed[row.name]}\n")

    def result(self, row: Row) -> dict[str, Any]:
        """Speed and picture against the baseline's of the same round."""
        if row.name in self.failed:
            return {"failed": self.failed[row.name]}
        own = self.seconds[row.name]
        return {
            "seconds": spread(own),
            "images_per_second": 1 / statistics.median(own),
            "ratio": spread([base / mine for base, mine in zip(self.seconds[BASELINE], own, strict=False)]),
            "difference": difference(self.pictures[row.name], self.pictures[BASELINE]),
        }


def table_on(pipeline: Any, options: argparse.Namespace, compiled: Compiled) -> dict[str, Any]:
    """Speed and picture of every row against the baseline."""
    rows, rounds = rows_for(pipeline, compiled), Rounds(pipeline, options)
    for row in rows:
        rounds.first(row)
    before = graphs()
    for number in range(options.repeats):
        for row in rows:
            # What is slow, or tells little beside the rest, is to be known and not waited for.
            if number == 0 or not row.once:
                rounds.again(row)
    new_graphs = graphs() - before
    results = {row.name: rounds.result(row) for row in rows}
    baseline = rounds.pictures[BASELINE]
    other = rounds.draw(rows[0], prompt=OTHER_PROMPT)
    goal = results["COMPILE=1"]
    reached = "failed" not in goal and (
        goal["ratio"]["median"] >= GOAL_RATIO and goal["difference"]["max"] <= GOAL_DIFFERENCE
    )
    return {
        "rows": results,
        "new_graphs_while_measured": new_graphs,
        "picture": {"deviation": float(baseline.std()), "another_prompt": difference(other, baseline)},
        "goal": {"setting": "COMPILE=1", "ratio": GOAL_RATIO, "difference": GOAL_DIFFERENCE, "reached": reached},
    }


def lines(results: dict[str, Any]) -> list[list[str]]:
    """The table of settings, one line for each row."""
    found = []
    for name, result in results["table"]["rows"].items():
        if "failed" in result:
            found.append([name, "failed", "", "", "", "", ""])
            continue
        ratio, apart = result["ratio"], result["difference"]
        found.append(
            [
                name,
                f"{result['images_per_second']:.3f}",
                f"{ratio['median']:.3f}",
                f"{ratio['min']:.3f} - {ratio['max']:.3f}",
                str(apart["max"]),
                f"{apart['mean']:.4f}",
                f"{100 * apart['share']:.2f} %",
            ]
        )
    return found
