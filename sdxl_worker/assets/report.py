"""What the command line prints: tables for people, JSON for programs."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.eviction import Listed
from sdxl_worker.assets.sidecar import read_sidecar


def write_json(value: object) -> None:
    """One indented JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def write_table(rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns, as wide as their widest cell; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def file_facts(file: AssetFile, *, inspect: bool) -> dict[str, Any]:
    """A resolved file as JSON; with `inspect` also what the file says of itself (title, tags, trigger words)."""
    read = read_sidecar(file.path)
    sidecar = read[0] if read is not None else None
    facts: dict[str, Any] = {
        "reference": file.reference,
        "path": str(file.path),
        "size": file.size,
        "sha256": file.sha256,
        "cached": file.cached,
        "format": sidecar.format if sidecar else "",
        "base_model": sidecar.base_model if sidecar else "",
    }
    return facts | {"facts": sidecar.facts if sidecar else {}} if inspect else facts


def write_facts(facts: dict[str, Any]) -> None:
    """A file's facts, one per line."""
    flat = {name: value for name, value in facts.items() if name != "facts"} | facts.get("facts", {})
    write_table([(name, _readable(name, value)) for name, value in flat.items()])


def _readable(name: str, value: Any) -> str:
    if name == "size":
        return megabytes(value)
    if isinstance(value, list | tuple):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in value)
    return str(value)


def listed_json(item: Listed) -> dict[str, Any]:
    """One line of `--list --json`; times in ISO 8601, UTC."""
    sidecar = item.sidecar
    return {
        "name": item.path.name,
        "reference": sidecar.reference if sidecar else item.path.name,
        "size": item.size,
        "base_model": sidecar.base_model if sidecar else "",
        "format": sidecar.format if sidecar else "",
        "sha256": sidecar.sha256 if sidecar else "",
        "fetched_at": sidecar.fetched_at if sidecar else "",
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(item.used_at)),
        "by_hand": item.by_hand,
    }


def write_list(items: Sequence[Listed]) -> None:
    """The cache as a table, the most recently used first, with the sum of the sizes."""
    rows = [("NAME", "REFERENCE", "SIZE", "BASE MODEL", "LAST USED")]
    for line in map(listed_json, items):
        by_hand = " (by hand)" if line["by_hand"] else ""
        rows.append(
            (
                line["name"],
                line["reference"] + by_hand,
                megabytes(line["size"]),
                line["base_model"] or "not checked yet",
                line["last_used"],
            )
        )
    write_table(rows)
    sys.stdout.write(f"{len(items)} files, {megabytes(sum(item.size for item in items))}\n")


def megabytes(size: int) -> str:
    """Bytes as decimal megabytes, as file hosts show them."""
    return f"{size / 1e6:.1f} MB"
