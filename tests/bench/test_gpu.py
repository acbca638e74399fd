"""`python -m bench.gpu`: failures are kept and cost nothing else, what is there is skipped, the real figures run."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import handler
from bench.drawings import PLOTS
from bench.gpu import __main__ as command
from bench.gpu import mixed, suite, utilisation
from bench.gpu import runner as runner_module
from bench.gpu.child import measured
from bench.gpu.figure import PROCESSES, Figure, Goal
from bench.gpu.figures import COMPILING_TESTS, FIGURES, chosen
from bench.gpu.runner import Runner
from bench.gpu.store import FAILED, OK, Store
from bench.gpu.suite import files_with_gpu_tests, measure
from bench.gpu.summary import summary
from bench.plots import draw_all
from schemas import validate_request
from tests.support.readme import ROOT

FACTS: dict[str, Any] = {
    "device": "a card",
    "kind": "cpu",
    "model": "tiny",
    "dry_run": True,
    "source": "abc",
    "commit": "def",
    "machine": {"date": "2026-01-01", "versions": {"torch": "2"}},
}


def figure(name: str, log: Path, goals: tuple[Goal, ...] = ()) -> Figure:
    options = {"log": str(log), "name": name}
    measure = f"tests.support.figures:{name.partition(' ')[0]}"
    return Figure(name, f"title of {name}", PROCESSES, measure, 5, options, options, goals)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results", FACTS)


def run(store: Store, figures: list[Figure], minutes: float = 5) -> tuple[Runner, list[str]]:
    lines: list[str] = []
    runner = Runner(store, minutes=minutes, dry_run=True, say=lines.append)
    runner.run(figures)
    return runner, lines


def test_a_figure_that_fails_is_kept_and_the_others_go_on(store: Store, tmp_path: Path):
    log = tmp_path / "log"
    names = ["good 1", "good 2", "wrong", "good 3", "dead", "good 4"]
    runner, lines = run(store, [figure(name, log) for name in names])
    ran = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    assert [name for name, _ in ran] == names
    process = dict(ran)
    assert process["good 1"] == process["good 2"] == process["wrong"]
    assert process["good 3"] == process["dead"] != process["wrong"]
    assert process["good 4"] != process["dead"]
    found = {name: json.loads((store.folder / f"{name}.json").read_text()) for name in names}
    assert [found[name]["outcome"] for name in names] == [OK, OK, FAILED, OK, FAILED, OK]
    assert found["good 4"]["result"] == {"ratio": 1.5}
    assert {"dry_run": True, "device": "a card", "commit": "def"}.items() <= found["good 4"].items()
    assert found["wrong"]["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "in wrong" in found["wrong"]["traceback"]
    assert found["dead"]["error"] == "its process ended with status 3"
    assert "the driver's last words" in found["dead"]["traceback"]
    assert runner.owed == {}
    assert any("dead: FAILED" in line for line in lines)


def is_alive(process: str) -> bool:
    """False as well where it has ended and nobody has asked how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_takes_far_too_long_is_ended(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "DRY_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(runner_module, "DRY_SECONDS", 0.1)
    run(store, [figure("endless", tmp_path / "log")])
    found = store.current("endless")
    assert found is not None
    assert found["error"].startswith("took longer than")
    processes = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(processes) == 2
    assert not [process for process in processes if is_alive(process)]


def test_what_has_a_limit_reaches_it_before_the_time_is_used_up(store: Store, tmp_path: Path):
    limited = figure("good", tmp_path / "log")
    limited = dataclasses.replace(limited, dry={**limited.dry, "limit_s": 100})
    run(store, [limited], minutes=1)
    found = store.current("good")
    assert found is not None
    assert 20 < found["options"]["limit_s"] <= 30


def test_what_does_not_fit_is_owed(store: Store, tmp_path: Path):
    goal = Goal("a ratio", ("ratio",), at_most=2)
    figures = [figure("good", tmp_path / "log", (goal,))]
    runner, _ = run(store, figures, minutes=0.1)
    assert not (tmp_path / "log").exists()
    assert runner.owed == {"good": "needs about 30 s, and 6 s are left"}
    assert "owed: needs about 30 s" in summary(figures, store, runner.owed)


def test_what_is_there_for_this_code_and_device_is_skipped(store: Store, tmp_path: Path, capsys):
    log = tmp_path / "log"
    figures = [figure("good", log), figure("wrong", log)]

    def ran_in(store: Store, again: set[str]) -> list[str]:
        log.write_text("")
        assert command.measure(figures, again, store, 5) == 1
        return [line.split()[0] for line in log.read_text().splitlines()]

    assert ran_in(store, set()) == ["good", "wrong"]
    assert ran_in(store, set()) == ["wrong"]
    assert "there already: good" in capsys.readouterr().err
    assert ran_in(store, {"good"}) == ["good", "wrong"]
    assert ran_in(Store(store.folder, {**FACTS, "source": "other"}), set()) == ["good", "wrong"]
    # What was measured before is the better estimate, also for other code.
    assert Store(store.folder, {**FACTS, "source": "third"}).estimate(figures[0], 100) < 100


def test_the_table_says_what_is_met(store: Store, tmp_path: Path):
    goals = (
        Goal("at most", ("ratio",), at_most=1.4),
        Goal("at least", ("ratio",), at_least=1.4),
        Goal("told", ("ratio",)),
        Goal("missing", ("no", "such"), at_most=1),
    )
    figures = [figure("good", tmp_path / "log", goals), figure("wrong", tmp_path / "log")]
    store.write(figures[0], OK, 1, {}, result={"ratio": 1.5})
    store.write(figures[1], FAILED, 1, {}, error="it broke")
    verdicts = [line.rpartition("  ")[2] for line in summary(figures, store, {}).splitlines()[2:]]
    assert verdicts[:4] == ["dry run", "dry run", "dry run", "not in the result"]
    real = Store(store.folder, {**FACTS, "dry_run": False})
    real.write(figures[0], OK, 1, {}, result={"ratio": 1.5})
    lines = [line.rstrip() for line in summary(figures, real, {}).splitlines()[2:]]
    assert lines[0].endswith("NOT MET")
    assert lines[1].endswith(" met")
    assert lines[4].endswith("FAILED")
    assert lines[5] == "wrong: it broke"


def test_figures_run_on_the_tiny_model_and_are_drawn(pipeline: Any, store: Store, monkeypatch: pytest.MonkeyPatch):
    """Those that take a second; `--model tiny --device cpu` runs them all."""
    monkeypatch.setitem(handler.process.__dict__, "worker", None)
    for each in chosen(["whole_request", "handler", "memory"]):
        options = {**each.dry, "device": "cpu", "model": "tiny"}
        result = json.loads(json.dumps(measured(each.measure, pipeline, options)))
        assert all(goal.value(result) is not None for goal in each.goals), each.name
        store.write(each, OK, 1, options, result=result)
    told: list[str] = []
    drawn = draw_all(store.folder, told.append)
    assert told == []
    assert sorted(path.name for path in drawn) == ["handler.png", "memory.png", "whole_request.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height) or ()) > 10


def test_what_cannot_be_drawn_is_told(store: Store, tmp_path: Path):
    store.write(dataclasses.replace(FIGURES[0], name="handler"), OK, 1, {}, result={"no": "such"})
    store.write(dataclasses.replace(FIGURES[0], name="memory"), FAILED, 1, {}, error="it broke")
    told: list[str] = []
    assert draw_all(store.folder, told.append) == []
    assert told == ["    handler: not drawn: KeyError: 'stages_ms'"]


def test_the_gpu_tests_are_counted(tmp_path: Path):
    file = tmp_path / "test_some.py"
    mark = "@pytest.mark." + "gpu\n"  # in one piece it would say that this file has GPU tests
    file.write_text(
        f"import pytest\n{mark}def test_good(): pass\n{mark}def test_bad(): assert 1 == 2\n"
        f"{mark}def test_left_out(): pytest.skip('no')\ndef test_other(): assert False\n"
    )
    options = command.argparse.Namespace(files=[str(file)], limit_s=100)
    found = measure(None, options)
    assert (found["passed"], found["failed"], found["skipped"], found["status"]) == (1, 1, 1, "1")
    assert [(each["test"].rpartition("::")[2], each["message"]) for each in found["failures"]] == [
        ("test_bad", "assert 1 == 2")
    ]


HANGING = """
import pytest, signal, subprocess, time
MARK
def test_good(): pass
MARK
def test_bad(): assert 1 == 2
MARK
def test_left_out(): pytest.skip("no")
MARK
def test_hangs():
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        if HARD:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        open("LOG", "w").write(f"{worker.pid} ")
        time.sleep(600)
    finally:
        worker.kill()
MARK
def test_not_begun(): pass
"""


@pytest.mark.parametrize("hard", [False, True])
def test_gpu_tests_that_hang_leave_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool):
    """At the limit pytest reports what has failed; where it does not end, what it wrote says which. No worker stays."""
    file, log = tmp_path / "test_some.py", tmp_path / "worker"
    source = HANGING.replace("MARK", "@pytest.mark." + "gpu").replace("HARD", str(hard))
    file.write_text(source.replace("LOG", str(log)))

    class Limited(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 100:
                while not (log.exists() and log.read_text().endswith(" ")):
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired("pytest", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Limited)
    monkeypatch.setattr(suite, "REPORT_S", 0.5 if hard else 20.0)
    found = measure(None, command.argparse.Namespace(files=[str(file)], limit_s=100))
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [(each["test"].rpartition("::")[2], each["message"]) for each in found["failures"]] == [
        ("test_bad", "" if hard else "assert 1 == 2"),
        ("test_hangs", "pytest did not come to its end here"),
    ]
    assert found["status"] == "stopped after 100 s"
    assert not is_alive(log.read_text().strip())


def test_what_nvidia_smi_says_is_read():
    found = list(utilisation.readings(["97\n", "[N/A]\n", "\n", "3\n"]))
    assert [percent for _, percent in found] == [97, 3]
    assert found[0][0] <= found[1][0] <= time.monotonic()


def test_the_table_of_figures_is_sound():
    assert len({each.name for each in FIGURES}) == len(FIGURES)
    assert set(PLOTS) <= {each.name for each in FIGURES}
    groups = [each.group for each in FIGURES]
    assert sum(one != other for one, other in itertools.pairwise(groups)) <= 5, "a new process each time"
    for each in FIGURES:
        module, _, function = each.measure.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), each.name
        assert set(each.full) == set(each.dry), each.name
    files = files_with_gpu_tests()
    assert "tests/lora/test_merge.py" in files
    assert set(COMPILING_TESTS) < set(files)
    assert files.index("tests/lora/test_merge.py") < files.index("tests/generate/test_load.py")
    with pytest.raises(ValueError, match="no figure is called nonsense"):
        chosen(["handler", "nonsense"])


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    def called(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments])
        return command.main()

    assert called("--list", "--model", "tiny", "--device", "cpu", "--out", str(tmp_path)) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{each.name} " in listed for each in FIGURES)
    assert called("--plots", "--out", str(tmp_path)) == 0
    for wrong in (["--only", "nonsense"], ["--again", "nonsense"]):
        with pytest.raises(SystemExit):
            called(*wrong)


def test_results_go_where_out_says_and_another_call_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    log, moved = tmp_path / "log", tmp_path / "moved"
    monkeypatch.setattr(command, "chosen", lambda _names: [figure("good", log)])

    def ran_with(out: Path) -> int:
        log.write_text("")
        monkeypatch.setattr(sys, "argv", ["bench.gpu", "--model", "tiny", "--device", "cpu", "--out", str(out)])
        assert command.main() == 0
        assert f"results: {out}" in capsys.readouterr().out
        return len(log.read_text().splitlines())

    monkeypatch.chdir(tmp_path)
    assert ran_with(Path("results")) == 1
    assert ran_with(tmp_path / "results") == 0
    (tmp_path / "results").rename(moved)
    assert ran_with(moved) == 0
    assert sorted(path.name for path in moved.iterdir()) == ["good.json"]


def test_the_wheels_have_what_the_worker_imports():
    """What requirements.txt pins comes along, or is among what a machine for PyTorch has; no pin is another one."""

    def pins(file: str) -> dict[str, str]:
        lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
        return {name.lower(): pin for name, _, pin in (line.partition("==") for line in lines if line)}

    there = {"torch", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "requests", "urllib3"}
    there |= {"filelock", "tqdm", "aiohttp", "numpy", "scipy", "pillow", "triton"}
    wheels, worker, tests = (
        pins(file) for file in ("bench/gpu/wheels.txt", "requirements.txt", "requirements-dev.txt")
    )
    assert worker.keys() - wheels.keys() <= there
    assert {name: pin for name, pin in wheels.items() if pin}.items() <= tests.items()


def test_the_mixed_run_is_of_good_jobs_of_all_sorts():
    made = mixed.jobs(50)
    assert made == mixed.jobs(50)
    requests = [validate_request(fields) for fields in made]
    assert sum(bool(request.loras) for request in requests) == 25
    assert {len(request.loras) for request in requests} == {0, 1, 2, 4}
    assert sum(fields.get("strength") == 0.6 for fields in made) == 12
    for name, least in (("width", 4), ("num_inference_steps", 4), ("scheduler", 5), ("guidance_scale", 2)):
        assert len({fields[name] for fields in made}) >= least, name
