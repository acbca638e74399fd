"""`python -m bench.cold_start`: turns, ratios of neighbours, and a contestant that fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import cold_start, starts
from bench.cold_start import measure, report, run_on
from bench.starts import Setting
from tests.integration.worker_process import WorkerProcess

LOG = """
INFO   | sdxl_worker.worker: ready after 4.50 s: imports 3.00, base model 1.00, LoRAs 0.50
INFO   | All fitness checks passed. (250.00ms)
"""
LINE = {"ms": {"validating": 1.0, "queued": 4.0, "denoising": 1000.0, "encoding": 20.0, "total": 1025.0}}


def start(log: list[str], name: str, seconds: list[float]) -> Any:
    def run(setting: Setting, work: Path) -> dict[str, float]:
        log.append(name)
        if not (left := seconds.pop(0)):
            raise RuntimeError("no picture")
        return {"model": 1.0, "total": left, "processor": 2 * left}

    return run


@pytest.fixture
def turns(monkeypatch) -> list[str]:
    """Who was started; the first turn takes longest and does not count."""
    log: list[str] = []
    seconds = {"bare": [9.0, 2.0, 4.0, 5.0], "local": [9.0, 1.0, 6.0, 5.0], "queue": [9.0, 4.0, 0.0]}
    monkeypatch.setattr(cold_start, "CONTESTANTS", {name: start(log, name, each) for name, each in seconds.items()})
    monkeypatch.setattr(cold_start, "imports", lambda *_: {"modules": 3, "all": 1.0, "torch": 0.5})
    return log


def test_the_three_take_turns_and_neighbours_are_compared(turns, tmp_path: Path):
    results = measure(Setting(tmp_path, "cpu", 3, 64, 1), tmp_path)
    assert turns == [
        *("queue", "local", "bare"),
        *("bare", "local", "queue"),
        *("queue", "local", "bare"),
        "bare",
        "local",
    ]
    assert results["ratio_to_bare"] == {"local": {"median": 1.0, "min": 0.5, "max": 1.5}}
    assert results["seconds"]["bare"] == {"median": 4.0, "min": 2.0, "max": 5.0}
    assert results["failed"] == {"queue": "no picture"}
    assert json.loads(json.dumps(results)) == results
    text = report(results)
    assert "queue failed: no picture" in text
    assert "seconds, local / bare" in text


def test_a_run_in_which_the_worker_never_draws_is_an_error(monkeypatch, tmp_path: Path):
    never = {name: start([], name, [1.0 if name == "bare" else 0.0] * 2) for name in cold_start.CONTESTANTS}
    monkeypatch.setattr(cold_start, "CONTESTANTS", never)
    with pytest.raises(RuntimeError, match="nothing to compare"):
        measure(Setting(tmp_path, "cpu", 1, 64, 1), tmp_path)


def test_a_ready_pipeline_is_saved_and_a_ready_folder_is_taken(turns, pipeline, tmp_path: Path, monkeypatch):
    seen: list[Setting] = []

    def measured(setting: Setting, work: Path) -> dict[str, Any]:
        assert (setting.folder / "model_index.json").is_file()
        seen.append(setting)
        return {}

    monkeypatch.setattr(cold_start, "measure", measured)
    run_on(pipeline, argparse.Namespace(size=64, steps=2, repeats=1))
    pipeline.save_pretrained(tmp_path / "model")
    run_on(None, argparse.Namespace(folder=tmp_path / "model", device="cpu"))
    assert [(one.device, one.size, one.steps, one.repeats) for one in seen] == [("cpu", 64, 2, 1), ("cpu", 256, 8, 7)]
    assert seen[1].folder == tmp_path / "model"


def test_stages_come_from_the_workers_own_lines():
    process = SimpleNamespace(text=LOG, lines=lambda: [LINE])
    stages = starts.stages_of(process, 6.0)  # type: ignore[arg-type]
    expected = {"imports": 3.0, "model": 1.0, "loras": 0.5, "fitness": 0.25, "job_beside": 0.005}
    expected |= {"picture": 1.0, "encoding": 0.02, "rest": 0.225, "total": 6.0}
    assert stages == pytest.approx(expected)


def test_processes_find_what_the_machine_has_on_its_path(tmp_path: Path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "carried_along.py").write_text("")
    script = "import carried_along, handler"
    with WorkerProcess(tmp_path / "log", {"PYTHONPATH": str(site)}, script=script) as process:
        assert process.exit_status() == 0, process.text
