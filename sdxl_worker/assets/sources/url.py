"""A direct http(s) URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.location import Location
from sdxl_worker.assets.references import RemoteReference, hashed_name
from sdxl_worker.assets.urls import canonical_url, split_http_url
from sdxl_worker.masking import mask
from sdxl_worker.settings import Settings


@dataclass(frozen=True)
class UrlReference(RemoteReference):
    """A URL as asked for (it may hold a secret in its query: show only `shown`); `is_trusted` when the operator named
    it and not a request: it may then be a host of their own network."""

    url: str
    is_trusted: bool = False

    def __repr__(self) -> str:
        return f"UrlReference({self.shown!r})"

    @property
    def canonical(self) -> str:
        return canonical_url(self.url)

    @property
    def shown(self) -> str:
        return mask(self.url)

    @property
    def file_name(self) -> str:
        return hashed_name(self.canonical, Path(unquote(urlsplit(self.url).path)).name)

    def locate(self, settings: Settings, budget: Budget) -> Location:
        """The URL itself; the suffix is "" for a download link without a file name."""
        suffix = Path(Path(self.url.partition("?")[0]).name).suffix.lower()
        return Location(Target(self.url, trusted_origin=self.url if self.is_trusted else ""), suffix=suffix)


def parse(text: str, settings: Settings, kind: Kind) -> UrlReference | None:
    """None for what is not an http(s) URL; raises BadReference for one that the worker does not open."""
    if not re.match(r"(?i)https?:", text):
        return None
    split_http_url(text)
    return UrlReference(text, kind.is_operators)
