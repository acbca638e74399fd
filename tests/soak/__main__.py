"""`python -m tests.soak --jobs 300 --seed 1`: mixed jobs of all modes for one worker, a report at the end."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.soak.run import Report, soak


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when a rule was broken, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the worker's log and cache stay; else they are deleted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary, tqdm(total=options.jobs, unit="job") as bar:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = soak(options.jobs, options.seed, folder, lambda done: bar.update(done - bar.n) and None)
    minutes = (time.monotonic() - start) / 60
    sys.stdout.write(_table(report, minutes))
    if options.json:
        found = {**vars(report), "minutes": round(minutes, 1)}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if report.broken else 0


def _table(report: Report, minutes: float) -> str:
    outcomes = ", ".join(f"{name} {number}" for name, number in report.outcomes.most_common())
    memory = ", ".join(f"{megabytes:.0f}" for megabytes in report.memory_mb)
    lines = [
        f"seed {report.seed}: {report.jobs} jobs in {minutes:.1f} minutes, {report.repeats} answers held against the "
        f"first of their kind, {len(report.broken)} rules broken",
        f"outcomes: {outcomes}",
        f"memory after each round in MB: {memory}; at most {report.growth_mb:+.1f} after the first",
        *report.broken,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
