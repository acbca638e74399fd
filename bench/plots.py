"""PNG plots, drawn from the JSON files alone: one beside each figure that has something to draw.

    python -m bench.plots      draws what the CPU's results under bench/results/ have to draw

`python -m bench.gpu` draws its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.drawings import PLOTS, Draw
from bench.gpu.figures import FIGURES
from bench.gpu.store import OK
from bench.report import RESULTS

Say = Callable[[str], Any]
# Result files of the CPU that are figures of bench.gpu under another name.
ON_THE_CPU: Mapping[str, str] = {
    "lora_switch_cpu": "switching",
    **{f"{name}_cpu": name for name in ("lora_layers", "lora_ranks", "lora_formats", "rendering", "cold_start")},
}
# As bench.models has it.
_NARROW = "about 1/8 width"


def draw_all(folder: Path, say: Say) -> list[Path]:
    """Draw every figure of bench.gpu in `folder` that was measured and has a plot; the paths.

    What cannot be drawn is told.
    """
    drawn = []
    for name, draw in PLOTS.items():
        file = folder / f"{name}.json"
        found = _read(file, say)
        if found is not None and found["outcome"] == OK:
            about = f"{found['device']}, torch {_torch(found)}, SDXL ({found['model']}), random weights"
            drawn += _plot(file, draw, found["result"], found["title"], about, found["dry_run"], say)
    return drawn


def draw_results_of_the_cpu(say: Say, folder: Path = RESULTS) -> list[Path]:
    """Draw what `folder` has of the CPU, which is of a narrow SDXL; the paths."""
    titles = {figure.name: figure.title for figure in FIGURES}
    drawn = []
    for result, name in ON_THE_CPU.items():
        file = folder / f"{result}.json"
        found = _read(file, say)
        if found is not None:
            about = f"{found['machine']['processor']}, torch {_torch(found)}, SDXL ({_NARROW}), random weights"
            # cold_start keeps what it measured under its name, the others beside the machine.
            drawn += _plot(file, PLOTS[name], found.get(name, found), titles[name], about, False, say)
    return drawn


def _read(file: Path, say: Say) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        say(f"    {file.stem}: not drawn: {error}")
        return None


def _torch(found: Mapping[str, Any]) -> str:
    return found["machine"]["versions"]["torch"]


def _plot(file: Path, draw: Draw, result: Any, title: str, about: str, dry_run: bool, say: Say) -> list[Path]:
    """The path of the plot, which lies beside `file`; none where drawing fails, which is told."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed (requirements-dev.txt)")
        return []
    try:
        # Not by pyplot: a figure of its own draws with Agg, and asks for no screen.
        plot = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
        axes = plot.subplots()
        draw(axes, result)
        axes.spines[["top", "right"]].set_visible(False)
        plot.suptitle(title, fontsize=11)
        plot.supxlabel(about, fontsize=8, color="0.4")
        if dry_run:
            plot.text(0.5, 0.5, "DRY RUN", fontsize=60, color="red", alpha=0.25, ha="center", va="center", rotation=25)
        plot.savefig(file.with_suffix(".png"))
    except Exception as error:
        say(f"    {file.stem}: not drawn: {type(error).__name__}: {error}")
        return []
    return [file.with_suffix(".png")]


def main() -> None:
    """Draw, and list what was drawn."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in draw_results_of_the_cpu(lambda line: sys.stderr.write(f"{line}\n")):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
