"""The workflows are valid YAML, run commands that exist, and release only what CHANGELOG.md describes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.readme import ROOT

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [(f"{file}.{name}", job) for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()]


def commands() -> list[str]:
    return [step["run"] for _, job in jobs() for step in job.get("steps", []) if "run" in step]


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_job_has_what_it_runs_on_and_known_predecessors(name: str, job: dict[str, Any]) -> None:
    if "uses" in job:
        assert (ROOT / job["uses"]).is_file()
        return
    assert job["runs-on"].startswith("ubuntu-")
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert "@v" in step.get("uses", "@v"), "actions are pinned to a version"
    needs = job.get("needs", [])
    before = {needs} if isinstance(needs, str) else set(needs)
    assert before <= set(WORKFLOWS[name.split(".")[0]]["jobs"])


def test_tests_run_the_two_commands_on_both_pythons_for_push_and_pull_request() -> None:
    tests = WORKFLOWS["tests"]
    assert {"push", "pull_request"} <= set(tests[True])  # YAML 1.1 reads `on` as true
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step["run"].split()[:2] for step in tests["jobs"]["tests"]["steps"] if "run" in step] == [
        ["make", "run"],
        ["make", "test"],
    ]


def test_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands():
        program, *arguments = shlex.split(command)
        if program == "make":
            assert arguments[0] in targets
        elif program == "python3":
            assert (ROOT / arguments[0]).is_file()
        else:
            assert program in ("sudo", "gh")


def test_a_tag_builds_the_image_with_the_build_secrets_after_the_checks() -> None:
    image = WORKFLOWS["release"]["jobs"]["image"]
    assert set(image["needs"]) == {"changelog", "tests"}
    (build,) = [step["with"] for step in image["steps"] if "build-push-action" in step.get("uses", "")]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^(\w+)=", build["secrets"], flags=re.MULTILINE) == re.findall(
        r"type=secret,id=(\w+)", dockerfile
    )
    for name in re.findall(r"^(\w+)=", build["build-args"], flags=re.MULTILINE):
        assert f"ARG {name}=" in dockerfile
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}


def release_notes(tag: str, folder: Path, changelog: str, version: str = "1.2.3") -> subprocess.CompletedProcess[str]:
    """The script of the release job, in a project with this changelog."""
    (folder / ".github").mkdir()
    script = folder / ".github" / "release_notes.py"
    script.write_text((ROOT / ".github" / "release_notes.py").read_text())
    (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\nversion = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(changelog)
    return subprocess.run([sys.executable, str(script), tag], capture_output=True, text=True, check=False)


def test_the_notes_are_the_section_of_the_version(tmp_path: Path) -> None:
    changelog = (
        "# Changelog\n\n## [Unreleased]\n\n- b\n\n## [1.2.3] - 2026-01-02\n\n- a\n\n## [1.2.2] - 2026-01-01\n\n- z\n"
    )
    done = release_notes("v1.2.3", tmp_path, changelog)
    assert (done.returncode, done.stdout) == (0, "- a\n")


@pytest.mark.parametrize(
    ("changelog", "version", "word"),
    [
        ("## [Unreleased]\n\n- b\n", "1.2.3", "CHANGELOG.md"),
        ("## [1.2.3] - 2026-01-02\n\n", "1.2.3", "CHANGELOG.md"),
        ("## [1.2.3] - 2026-01-02\n\n- a\n", "1.2.2", "pyproject.toml"),
    ],
)
def test_a_version_that_is_not_described_is_not_released(
    tmp_path: Path, changelog: str, version: str, word: str
) -> None:
    done = release_notes("v1.2.3", tmp_path, changelog, version)
    assert done.returncode == 1
    assert word in done.stderr
