"""One hostile job, and the random choices that the generators share."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.support.http_server import Reply

# Stands where a password, token or signature would: it may not come back.
SECRET = "s3cr3tvalue"
# The smallest picture, so that a case costs what it does to the worker and not its rendering.
SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "num_inference_steps": 1, "seed": 5}


@dataclass(frozen=True)
class Case:
    """A job with what it refers to: paths of the server with their replies, files put into the cache folder by hand.

    `what` says in a few words what is wrong with it. Only with `served` may the worker connect to the test server.
    """

    what: str
    job: Any
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    by_hand: dict[str, bytes] = field(default_factory=dict)
    served: bool = True


def job(**fields: Any) -> dict[str, Any]:
    """A small picture with these fields."""
    return {"id": "hostile", "input": {**SMALL, **fields}}


def noise(random: Random, size: int) -> bytes:
    """`size` arbitrary bytes."""
    return random.randbytes(size)


def damaged(random: Random, content: bytes) -> tuple[str, bytes]:
    """`content` cut, extended or with some of its bits turned."""
    kind = random.choice(("cut", "cut short", "flipped", "zeroed", "extended", "doubled", "spliced"))
    size = len(content)
    at = random.randrange(size)
    if kind == "cut":
        return kind, content[:at]
    if kind == "cut short":
        return kind, content[: random.randrange(min(64, size))]
    if kind == "extended":
        return kind, content + noise(random, random.choice((1, 7, 5000)))
    if kind == "doubled":
        return kind, content * 2
    if kind == "spliced":
        return kind, content[at:] + content[:at]
    changed = bytearray(content)
    # The beginning holds the headers: half of the faults go there.
    for _ in range(random.choice((1, 1, 3, 50))):
        place = random.randrange(min(size, 400) if random.random() < 0.5 else size)
        changed[place] = 0 if kind == "zeroed" else changed[place] ^ 1 << random.randrange(8)
    return kind, bytes(changed)


def words(text: str) -> list[str]:
    """The words of a text: one pool of many short values."""
    return text.split()
