"""The table at the end: what was wanted, what was measured, and whether that is met, failed or owed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.gpu.figure import Figure
from bench.gpu.store import OK, Store
from bench.report import table


def summary(figures: Sequence[Figure], store: Store, owed: Mapping[str, str]) -> str:
    """A row for each goal, and for each figure without one; the reasons of what failed below."""
    rows: list[list[str]] = []
    reasons: list[str] = []
    for figure in figures:
        found = store.current(figure.name)
        if found is None:
            reason = owed.get(figure.name, "not measured yet")
            rows.append([figure.title, figure.name, "", "", f"owed: {reason}"])
        elif found["outcome"] != OK:
            rows.append([figure.title, figure.name, "", "", "FAILED"])
            reasons.append(f"{figure.name}: {found['error']}")
        else:
            rows += _goals(figure, found)
    lines = [table(["what", "figure", "goal", "measured", "verdict"], rows), *reasons]
    if store.facts["dry_run"]:
        lines.append("DRY RUN: a small model, which shows that the figures run and nothing else.")
    return "\n".join(lines)


def _goals(figure: Figure, found: Mapping) -> list[list[str]]:
    if not figure.goals:
        return [[figure.title, figure.name, "", "", f"measured in {found['seconds']:.0f} s"]]
    rows = []
    for goal in figure.goals:
        value = goal.value(found["result"])
        if value is None:
            rows.append([goal.what, figure.name, goal.limit, "", "not in the result"])
            continue
        verdict = "" if not goal.limit else "met" if goal.is_met(value) else "NOT MET"
        rows.append([goal.what, figure.name, goal.limit, f"{value:.4g}", "dry run" if found["dry_run"] else verdict])
    return rows
