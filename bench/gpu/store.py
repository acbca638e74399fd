"""Results on disk: one JSON file for each figure, written the moment it is there, and what they are results of."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.figure import Figure
from bench.report import RESULTS, write_result

ROOT = Path(__file__).parents[2]
OK, FAILED = "ok", "failed"


def source_hash(root: Path = ROOT) -> str:
    """12 hex digits over the worker's code and pins.

    Figures are of this, not of a commit: committing them makes a new commit and no other worker, and a copy of the
    project without .git has no commit.
    """
    files = sorted([*(root / "sdxl_worker").rglob("*.py"), root / "handler.py", root / "requirements.txt"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, with "+" behind it where files differ; empty without git."""
    git = ["git", "-C", str(root)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if changed else "")


def default_folder(device_name: str, dry_run: bool) -> Path:
    """A folder for each sort of card under bench/results/gpu/."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return RESULTS / "gpu" / ("dry-run" if dry_run else slug)


@dataclass(frozen=True)
class Store:
    """The results in one folder. `facts` go into each: device, model, source, commit, machine."""

    folder: Path
    facts: dict[str, Any]

    def write(self, figure: Figure, outcome: str, seconds: float, options: dict[str, Any], **what: Any) -> Path:
        """Keep what came of a figure: `result=...`, or `error=...` where it failed."""
        about = {"figure": figure.name, "title": figure.title, "outcome": outcome, "seconds": round(seconds, 1)}
        return write_result(figure.name, {**about, **self.facts, "options": options, **what}, self.folder)

    def read(self, name: str) -> dict[str, Any] | None:
        """What is there for the figure, of whatever code and device; None for nothing that can be read."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def current(self, name: str) -> dict[str, Any] | None:
        """What is there for the figure of this code on this device; a failure too."""
        found = self.read(name)
        same = found is not None and all(found.get(key) == self.facts[key] for key in ("device", "model", "source"))
        return found if same else None

    def estimate(self, figure: Figure, default: float) -> float:
        """Seconds that the figure will take: as many as before on such a device, else `default`."""
        found = self.read(figure.name) or {}
        is_alike = all(found.get(key) == self.facts[key] for key in ("device", "model"))
        return float(found["seconds"]) if is_alike and found["outcome"] == OK else default
