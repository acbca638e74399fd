"""docs/ARCHITECTURE.md and CONTRIBUTING.md name files and tests that are there, and no document that is missing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.readme import ROOT

ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMED_TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", ARCHITECTURE)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED_TESTS}))
def test_every_test_that_the_fault_list_names_is_there(file: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    missing = [name for other, name in NAMED_TESTS if other == file and f"def {name}(" not in source]
    assert missing == []


def test_every_row_of_the_fault_list_has_a_test() -> None:
    section = ARCHITECTURE.split("## Faults")[1].split("## Measured")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| (?!Row|Input \|)", line)]
    assert len(rows) > 50
    assert [row for row in rows if "::" not in row.split("|")[-2]] == []


def test_the_layers_are_those_of_the_house() -> None:
    from tests.test_house import LAYERS

    section = ARCHITECTURE.split("## Layout")[1].split("## One request")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    said = [{name.strip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", row)} for row in rows]
    assert said == [set(layer) for layer in LAYERS]


def test_every_file_that_contributing_names_is_there() -> None:
    paths = re.findall(r"`((?:sdxl_worker|tests|docs|\.runpod|\.github)/[\w./]+|\w+\.(?:md|txt|toml))`", CONTRIBUTING)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_lead_to_files() -> None:
    for text, folder in ((ARCHITECTURE, ROOT / "docs"), (CONTRIBUTING, ROOT)):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
        assert [link for link in links if not (folder / link).exists()] == []


def test_the_project_refers_to_no_document_that_it_does_not_have() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() if listed.returncode == 0 else []
    documents = {path.name for path in ROOT.rglob("*.md") if ".venv" not in path.parts}
    for name in names:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yml", ".toml") and path.is_file():
            text = path.read_text(encoding="utf-8")
            named = set(re.findall(r"\b([A-Z][A-Z_]+\.md)\b", text))
            assert named <= documents, f"{name}: {named - documents}"
            assert not re.search(r"\b(?:DESIGN|FAULTS)\b(?!\|)", text.replace("DESIGN|FAULTS", "")), name


def test_the_license_is_mit() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
    assert Path(ROOT / "pyproject.toml").read_text().count('license = "MIT"') == 1
