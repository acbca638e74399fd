"""The README's tables, read as the tests need them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_table(heading: str, column: str) -> list[dict[str, str]]:
    """The rows of the first table after `heading` whose first column is called `column`, as header -> cell."""
    section = re.split(rf"^#+ {re.escape(heading)}$", README, maxsplit=1, flags=re.MULTILINE)[1]
    lines = section[section.index(f"| {column} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def unquoted(cell: str) -> str:
    """The text of a cell that is one piece of code."""
    return cell.removeprefix("`").removesuffix("`")
