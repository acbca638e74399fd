"""Print what CHANGELOG.md says of a version: python3 .github/release_notes.py v1.2.3

Exits with 1 when it says nothing, or when pyproject.toml has another version.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """The section of the version that `tag` names; raises ValueError with what is missing."""
    version = tag.removeprefix("v")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if project != version:
        raise ValueError(f"pyproject.toml has version {project}, the tag says {version}")
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [section for section in sections if re.match(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n", section)]
    if len(found) != 1 or not found[0].partition("\n")[2].strip():
        raise ValueError(f"CHANGELOG.md needs one section '## [{version}] - YYYY-MM-DD' that says what changed")
    return found[0].partition("\n")[2].strip() + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
