"""CONTRIBUTING.md's table is true: each addition is made in a copy of the project, in those files alone, and works."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.readme import ROOT


class Edit(NamedTuple):
    """`new` in front of `old` in a file; without `old` the file is new."""

    file: str
    new: str
    old: str = ""


SCHEDULER = (
    [
        Edit(
            "sdxl_worker/schedulers.py",
            '    Scheduler("UniPC bh1", "UniPCMultistepScheduler", "UniPC bh1", {"solver_type": "bh1"}),\n',
            '    Scheduler("DPM2", ',
        )
    ],
    """
    from schemas import validate_request
    from sdxl_worker.schedulers import SCHEDULERS  # from which samplers.py makes them
    assert validate_request({"prompt": "a", "scheduler": "uni_pc_bh1 Karras"}).scheduler == "UniPC bh1"
    assert SCHEDULERS["UniPC bh1"].class_name == "UniPCMultistepScheduler"
    """,
)
FIELD = (
    [
        Edit(
            "sdxl_worker/request/fields.py",
            "    clip_skip: int = _input(whole(0, 12), 0)\n",
            "    loras_requested: bool",
        )
    ],
    """
    from schemas import INPUT_SCHEMA, validate_request
    assert INPUT_SCHEMA["clip_skip"]["default"] == 0
    assert validate_request({"prompt": "a"}).clip_skip == 0
    assert validate_request({"prompt": "a", "clip_skip": 12}).clip_skip == 12
    try:
        validate_request({"prompt": "a", "clip_skip": 13})
    except Exception as error:
        assert "clip_skip must be a whole number from 0 to 12, not 13" in str(error)
    else:
        raise AssertionError("taken")
    """,
)
SETTING = (
    [
        Edit(
            "sdxl_worker/settings.py",
            '    idle_s: float = _variable("IDLE_S", 5.0, "an example", number(0, 60))\n',
            "    hf_token: str",
        )
    ],
    """
    from sdxl_worker.settings import Settings
    assert Settings.from_environment({"IDLE_S": "7"}).idle_s == 7.0
    """,
)
FORMAT = (
    [
        Edit(
            "sdxl_worker/lora/formats/diagonal.py",
            '''
            """A scale for each output."""
            from dataclasses import dataclass
            from torch import Tensor
            from sdxl_worker.lora.formats.format import WEIGHT, Format, as_written

            @dataclass(frozen=True)
            class Diagonal:
                gain: Tensor

                def change(self, weight: Tensor) -> Tensor:
                    return self.gain[:, None] * weight

            DIAGONAL = Format(
                suffixes=as_written("gain"),
                marks=frozenset({"gain"}),
                build=lambda roles, alpha, inner: {WEIGHT: Diagonal(roles["gain"])},
                name=lambda modules: "Diagonal",
            )
            ''',
        ),
        Edit(
            "sdxl_worker/lora/formats/__init__.py",
            "from sdxl_worker.lora.formats.diagonal import DIAGONAL\n",
            "from sdxl_worker.lora.formats.difference",
        ),
        Edit("sdxl_worker/lora/formats/__init__.py", "    DIAGONAL,\n", "    LOW_RANK,\n"),
    ],
    """
    import torch
    from sdxl_worker.lora.formats import SUFFIXES, build_changes, format_name
    assert SUFFIXES["gain"]
    changes = build_changes("module", {"gain": torch.tensor([1.0, 2.0])})
    assert changes["weight"].change(torch.ones(2, 2)).tolist() == [[1, 1], [2, 2]]
    assert format_name([{"gain": (2,)}]) == "Diagonal"
    """,
)
SOURCE = (
    [
        Edit(
            "sdxl_worker/assets/sources/mirror.py",
            '''
            """mirror:NAME, a file of one host."""
            from sdxl_worker.assets.sources.url import UrlReference

            def parse(text, settings, kind):
                return UrlReference(f"https://example.com/{text[7:]}") if text.startswith("mirror:") else None
            ''',
        ),
        Edit("sdxl_worker/assets/sources/__init__.py", '        "mirror": mirror.parse,\n', '        "url": url.parse'),
        Edit(
            "sdxl_worker/assets/sources/__init__.py",
            "from sdxl_worker.assets.sources import mirror\n",
            "from sdxl_worker.errors",
        ),
    ],
    """
    from sdxl_worker.assets.sources import parse_reference
    from sdxl_worker.kinds import LORA
    from sdxl_worker.settings import Settings
    assert parse_reference("mirror:a.safetensors", Settings(), LORA).url == "https://example.com/a.safetensors"
    """,
)
KIND = (
    [
        Edit(
            "sdxl_worker/kinds.py",
            """
            CONTROL = Kind(
                name="control net",
                suffixes=(".safetensors",),
                sources=("hub", "url", "local"),
                folder=lambda settings: settings.lora_cache_dir.parent / "controls",
                max_bytes=lambda _: 1 << 20,
                timeout_s=lambda settings: settings.download_timeout,
                check=lambda path: {"bytes": path.stat().st_size},
                codes=MappingProxyType({NotFound: "CONTROL_NOT_FOUND"}),
            )
            """,
            "# MODEL_ID as a single file.",
        )
    ],
    """
    import pathlib, tempfile
    import numpy
    from safetensors.numpy import save_file
    from sdxl_worker.assets.store import AssetStore
    from sdxl_worker.kinds import CONTROL
    from sdxl_worker.settings import Settings
    folder = pathlib.Path(tempfile.mkdtemp())
    store = AssetStore(Settings(lora_cache_dir=folder / "loras"))
    (folder / "controls").mkdir()
    save_file({"clip_l": numpy.zeros((1, 8))}, folder / "controls" / "style.safetensors")
    assert store.get("style", CONTROL).path.name == "style.safetensors"
    try:
        store.get("absent", CONTROL)
    except Exception as error:
        assert error.code == "CONTROL_NOT_FOUND"
    else:
        raise AssertionError("found")
    """,
)
CHANGES = {
    "scheduler": SCHEDULER,
    "field": FIELD,
    "setting": SETTING,
    "format": FORMAT,
    "source": SOURCE,
    "kind": KIND,
}


def dedented(text: str) -> str:
    """The text without the indentation that it has in this file."""
    lines = text.split("\n")
    if not lines[0]:
        width = len(lines[1]) - len(lines[1].lstrip())
        lines = [line[width:] if not line[:width].strip() else line for line in lines[1:]]
    return "\n".join(lines)


@pytest.mark.parametrize("name", CHANGES)
def test_an_addition_takes_the_files_that_are_said(name: str, tmp_path: Path) -> None:
    edits, check = CHANGES[name]
    shutil.copytree(ROOT / "sdxl_worker", tmp_path / "sdxl_worker", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "schemas.py", tmp_path)
    for edit in edits:
        path = tmp_path / edit.file
        text = path.read_text(encoding="utf-8") if edit.old else ""
        assert text.count(edit.old) >= 1, f"{edit.old!r} is not in {edit.file} any more"
        path.write_text(text.replace(edit.old, dedented(edit.new) + edit.old, 1) if edit.old else dedented(edit.new))
    done = subprocess.run(
        [sys.executable, "-c", dedented(check)],
        cwd=tmp_path,
        env={"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
