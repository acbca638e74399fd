"""`python -m tests.hostile --minutes 10 --seed 1`: hostile jobs for as long as asked, a table at the end."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

import torch
from tqdm import tqdm

from tests.hostile.arena import Arena, Hung, Result
from tests.hostile.measure import resident_mb, settle_memory

USABLE_EVERY = 25
# Libraries are loaded and caches filled by then: what comes on top is growth.
WARM_UP = 200
GROWTH_LIMIT_MB = 200.0


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when a rule was broken, 0 otherwise."""
    options = _options(arguments)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")  # Pillow's, by the hundred
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, Arena(Path(folder)) as arena:
        if options.only:
            family, _, index = options.only.partition(":")
            result = arena.run(options.seed, family, int(index))
            sys.stdout.write(f"{json.dumps(asdict(result), indent=2)}\n")
            return 1 if result.broken else 0
        report = _long_run(arena, options.seed, 60 * options.minutes, options.family or arena.FAMILIES)
    sys.stdout.write(_table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["hung"]:
        os._exit(1)  # the thread that hangs would keep the process
    return 1 if report["broken"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", choices=Arena.FAMILIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--only", metavar="FAMILY:INDEX", help="run one case of the seed again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser.parse_args(arguments)


def _long_run(arena: Arena, seed: int, seconds: float, families: tuple[str, ...]) -> dict[str, Any]:
    results: list[Result] = []
    broken: list[str] = []
    hung = ""
    memory: list[int] = []
    start = time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc=f"seed {seed}", dynamic_ncols=True) as bar:
        while not hung and time.monotonic() - start < seconds:
            family, index = families[len(results) % len(families)], len(results) // len(families)
            try:
                result = arena.run(seed, family, index)
            except Hung as error:
                hung = str(error)
                broken.append(hung)
                break
            results.append(result)
            broken += [f"--seed {seed} --only {family}:{index}: {result.what}: {rule}" for rule in result.broken]
            if len(results) % USABLE_EVERY == 0:
                broken += [f"after {family}:{index}: {rule}" for rule in arena.check_usable()]
            if len(results) % WARM_UP == 0:
                settle_memory()
                memory.append(round(resident_mb()))
            bar.set_postfix(cases=len(results), broken=len(broken), refresh=False)
            bar.update(min(round(time.monotonic() - start), bar.total) - bar.n)
    settle_memory()
    growth = resident_mb() - memory[0] if memory else 0.0
    if growth > GROWTH_LIMIT_MB:
        broken.append(f"the process grew by {growth:.0f} MB after the first {WARM_UP} cases")
    return {
        "seed": seed,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "cases": len(results),
        "growth_mb": round(growth, 1),
        "memory_mb": memory,
        "hung": hung,
        "families": {family: _summary([r for r in results if r.family == family]) for family in families},
        "broken": broken,
    }


def _summary(results: list[Result]) -> dict[str, Any]:
    slowest = max(results, key=lambda result: result.cpu_s, default=None)
    largest = max(results, key=lambda result: result.peak_mb, default=None)
    return {
        "cases": len(results),
        "codes": dict(Counter(result.code or "a picture" for result in results).most_common()),
        "slowest": slowest and [round(slowest.cpu_s, 2), slowest.index, slowest.what],
        "longest_wait_s": round(max((result.wall_s for result in results), default=0.0), 1),
        "largest": largest and [round(largest.peak_mb), largest.index, largest.what],
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"seed {report['seed']}: {report['cases']} cases in {report['minutes']} minutes, "
        f"{report['growth_mb']} MB of growth, {len(report['broken'])} rules broken",
        "",
        f"{'family':10}{'cases':>7}{'CPU s':>8}{'wall s':>8}{'MB':>7}  answers",
    ]
    for family, summary in report["families"].items():
        codes = ", ".join(f"{code} {number}" for code, number in summary["codes"].items())
        cpu, peak = (summary[name][0] if summary[name] else 0 for name in ("slowest", "largest"))
        lines.append(f"{family:10}{summary['cases']:7}{cpu:8}{summary['longest_wait_s']:8}{peak:7}  {codes}")
    lines += ["", *report["broken"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
