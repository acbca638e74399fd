"""What every measurement shares: the machine it ran on, a table for people, a JSON file to keep."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "huggingface_hub", "runpod", "requests"),
)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Date, processor, cores, memory, GPU if it is used, Python and package versions."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "torch_threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory_gb": round(properties.total_memory / 2**30, 1)}
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return {"machine": found}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned text table with a line under the header."""
    widths = [max(len(str(line[column])) for line in (header, *rows)) for column in range(len(header))]
    lines = [_line(header, widths), "  ".join("-" * width for width in widths), *(_line(row, widths) for row in rows)]
    return "\n".join(lines)


def write_result(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results` to NAME.json in `folder` (bench/results), whole or not at all, and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return unfinished.replace(path)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (str(cell) for cell in row)
    cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
