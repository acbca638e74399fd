"""Every figure that needs a GPU, in one command: the tests marked gpu, then SDXL at full size with random weights.

    python -m bench.gpu                            on a machine with a GPU; stops within 9 minutes
    python -m bench.gpu                            again: goes on with what is missing
    python -m bench.gpu --list                     what there is, how long it takes, what is there already
    python -m bench.gpu --only handler switching   these alone
    python -m bench.gpu --again handler            measure it anew
    python -m bench.gpu --plots                    draw what is there, measure nothing (needs no GPU)
    python -m bench.gpu --model tiny --device cpu  dry run: every line of it on the tiny model, in minutes

Nothing is downloaded. Each figure is one JSON file under bench/results/gpu/DEVICE/, written the moment it is there,
with the device, driver, versions and commit; PNG plots are drawn from these files at the end. A figure that is there
for this code and this device is not measured again; one that failed is. Figures that would not fit into the time that
is left are owed to the next call, and the table at the end says so. The exit status is 1 when one failed, else 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.gpu.figure import DRY_SECONDS, Figure
from bench.gpu.figures import chosen
from bench.gpu.store import FAILED, OK, Store, commit, default_folder, source_hash
from bench.report import machine, table


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the figures and end")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these figures (default all)")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure these anew, and nothing else")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing that would end later (default 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are (default bench/results/gpu/DEVICE)")
    parser.add_argument("--plots", action="store_true", help="only draw the plots of what is there")
    parser.add_argument("--model", choices=("full", "narrow", "tiny"), default="full", help="default full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default cuda)")
    return parser


def facts(model: str, device: str) -> dict[str, Any]:
    """What the results are of: goes into every file."""
    found = machine(device)
    name = found["machine"]["gpu"]["name"] if device == "cuda" else found["machine"]["processor"]
    # Smaller models are there to try this out: their figures mean nothing.
    dry_run = model != "full" or device != "cuda"
    about = {"device": name, "kind": device, "model": model, "dry_run": dry_run}
    return {**about, "source": source_hash(), "commit": commit(), **found}


def listing(figures: list[Figure], store: Store) -> str:
    """The table of --list."""
    rows = []
    for figure in figures:
        found = store.current(figure.name)
        state = "missing" if found is None else f"{found['outcome']}, {found['machine']['date']}"
        default = figure.seconds if store.facts["model"] == "full" else DRY_SECONDS
        rows.append([figure.name, figure.group, f"{store.estimate(figure, default):.0f} s", state, figure.title])
    return table(["figure", "group", "about", "here", "what"], rows)


def main() -> int:
    """Parse the command line, measure, draw, print; the exit status."""
    parser = arguments()
    options = parser.parse_args()
    try:
        figures = chosen(options.only or options.again)
        again = {figure.name for figure in chosen(options.again)} if options.again else set()
    except ValueError as error:
        parser.error(str(error))
    if options.plots:
        return _draw(options.out)
    device = options.device if options.device == "cpu" or _has_gpu() else ""
    if not device and not options.list:
        parser.error("there is no CUDA device here; --model tiny --device cpu is a dry run")
    about = facts(options.model, device or "cpu")
    store = Store(options.out or default_folder(about["device"], about["dry_run"]), about)
    if options.list:
        sys.stdout.write(f"{listing(figures, store)}\nresults: {store.folder}\n")
        return 0
    return measure(figures, again, store, options.minutes)


def measure(figures: list[Figure], again: set[str], store: Store, minutes: float) -> int:
    """Measure what is missing, draw, and print the table; the exit status."""
    from bench.gpu.runner import Runner
    from bench.plots import draw_all

    runner = Runner(store, minutes=minutes, dry_run=store.facts["dry_run"], say=_say)
    there = {figure.name: store.current(figure.name) for figure in figures}
    is_there = {name for name, found in there.items() if found is not None and found["outcome"] == OK} - again
    if is_there:
        _say(f"there already: {', '.join(sorted(is_there))}")
    try:
        runner.run([figure for figure in figures if figure.name not in is_there])
    except KeyboardInterrupt:
        _say("stopped; the next call goes on from here")
    drawn = draw_all(store.folder, _say)
    _say(f"{len(drawn)} plots drawn" if drawn else "no plots drawn")
    from bench.gpu.summary import summary

    sys.stdout.write(f"\n{summary(figures, store, runner.owed)}\n\nresults: {store.folder}\n")
    outcomes = [found["outcome"] for figure in figures if (found := store.current(figure.name)) is not None]
    return int(FAILED in outcomes)


def _draw(folder: Path | None) -> int:
    from bench.plots import draw_all
    from bench.report import RESULTS

    folders = [folder] if folder else sorted(path for path in (RESULTS / "gpu").glob("*") if path.is_dir())
    for each in folders:
        for path in draw_all(each, _say):
            sys.stdout.write(f"{path}\n")
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
