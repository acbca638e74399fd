"""Where a reference may lead: one file and one line of the table for each source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.references import MAX_REFERENCE, Reference
from sdxl_worker.assets.sources import civitai, hub, local, url
from sdxl_worker.errors import BadReference
from sdxl_worker.masking import has_query, mask
from sdxl_worker.settings import Settings
from sdxl_worker.text import is_unicode

# The first that takes a text decides; a kind names those that its references may lead to.
SOURCES: Mapping[str, Callable[[str, Settings, Kind], Reference | None]] = MappingProxyType(
    {
        "civitai": civitai.parse,
        "hub": hub.parse,
        "url": url.parse,
        "local": local.parse,
    }
)


def parse_reference(text: str, settings: Settings, kind: Kind) -> Reference:
    """What `text` means as a reference to a file of `kind`; raises BadReference. No network."""
    reference = text.strip() if isinstance(text, str) else ""
    if not reference:
        raise BadReference(f"a {kind.name} reference is empty")
    if len(reference) > MAX_REFERENCE:
        raise BadReference(f"a {kind.name} reference is longer than {MAX_REFERENCE} characters")
    if "\\" in reference or not reference.isprintable() or not is_unicode(reference):
        raise BadReference(f"the {kind.name} reference {mask(reference)} holds characters that are not allowed")
    if has_query(reference) and not re.match(r"(?i)https?:", reference):
        # Its name in the cache, and whatever says it, would hold a token that was meant for a host.
        raise BadReference(f"the {kind.name} reference {mask(reference)} has a query but no https:// in front of it")
    for name in SOURCES:
        if kind.may_come_from(name) and (parsed := SOURCES[name](reference, settings, kind)) is not None:
            return parsed
    if re.match(r"[^/]*:", reference):
        raise BadReference(f"the {kind.name} reference {mask(reference)} is neither http nor https, nor a Civitai urn")
    raise BadReference(f"the {kind.name} reference {mask(reference)} has no form that this worker knows")
