"""Where a reference's bytes are right now."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdxl_worker.assets.connect import Target


@dataclass(frozen=True)
class Location:
    """What to GET for a reference; `identity` changes when a moving reference moves, `sha256` ("" = unknown) is
    the host's own claim, `suffix` the kind that the file's name announces ("" = it announces nothing).
    `beside` are JSON files beside it that belong to it, by the name that their text gets in the file's metadata."""

    target: Target
    identity: str = ""
    sha256: str = ""
    suffix: str = ""
    beside: Mapping[str, Target] = field(default_factory=dict)
