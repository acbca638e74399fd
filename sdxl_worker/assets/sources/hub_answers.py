"""Bounds on what the Hub's API answers: huggingface_hub reads an answer whole, however long and large it gets."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from sdxl_worker.errors import FetchFailed

# The list of a repo with 10,000 files has about 1 MB.
MAX_BYTES = 8 << 20
MAX_SECONDS = 60.0
# Unpacked inside the HTTP library, a small answer could become any size.
HEADERS = {"Accept-Encoding": "identity"}


def bound_answers(client: Any) -> None:
    """Let `client`, which is huggingface_hub's session, end answers of the API that break a bound with FetchFailed.

    Calling it again changes nothing.
    """
    hooks = client.event_hooks
    if _bound not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _bound]}


def _bound(response: Any) -> None:
    if "/api/" not in response.request.url.path:
        return
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchFailed("the Hugging Face Hub packs an answer that was not to be packed")
    # huggingface_hub decides which of httpx' successors this is.
    library = sys.modules[type(response).__module__.partition(".")[0]]
    response.stream = _bounded(library.SyncByteStream, response.stream)


def _bounded(base: type[Any], stream: Any) -> Any:
    class Bounded(base):
        def __iter__(self) -> Iterator[bytes]:
            size, end = 0, time.monotonic() + MAX_SECONDS
            for part in stream:
                size += len(part)
                if size > MAX_BYTES or time.monotonic() > end:
                    raise FetchFailed(
                        f"the Hugging Face Hub answers with more than {MAX_BYTES >> 20} MiB, or too slowly"
                    )
                yield part

        def close(self) -> None:
            stream.close()

    return Bounded()
