"""Plots of what was measured on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from bench.drawings import PLOTS
from bench.plots import ON_THE_CPU, draw_results_of_the_cpu

MACHINE = {"processor": "a processor", "versions": {"torch": "2.13.0"}}


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


def test_what_there_is_is_drawn_and_what_cannot_be_is_told(tmp_path: Path):
    case = {"weights": 10, "limit_s": _spread(0.1)}
    points = [{"loras": 1, "modules": modules, "switch_s": _spread(modules / 1000)} for modules in (5, 10)]
    layers: dict[str, Any] = {"machine": MACHINE, "cases": {"all": case}, "points": points}
    (tmp_path / "lora_layers_cpu.json").write_text(json.dumps(layers))
    started = {"stages_s": {"bare": {"imports": 2.0, "picture": 1.0, "total": 3.0}, "local": {"imports": 1.0}}}
    (tmp_path / "cold_start_cpu.json").write_text(json.dumps({"machine": MACHINE, "cold_start": started}))
    (tmp_path / "lora_ranks_cpu.json").write_text(json.dumps({"machine": MACHINE}))
    (tmp_path / "rendering_cpu.json").write_text("half a fi")
    told: list[str] = []
    drawn = draw_results_of_the_cpu(told.append, tmp_path)
    assert [path.name for path in drawn] == ["lora_layers_cpu.png", "cold_start_cpu.png"]
    with Image.open(tmp_path / "lora_layers_cpu.png") as plot:
        assert plot.size == (900, 540)
    assert sorted(line.split(":")[0].strip() for line in told) == ["lora_ranks_cpu", "rendering_cpu"]


def test_every_result_of_the_cpu_has_a_plot():
    assert set(ON_THE_CPU.values()) <= set(PLOTS)
