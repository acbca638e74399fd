"""A request's LoRAs made ready: fetched, read, and held in memory, before the device is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.download.cache import in_use, quarantine, read_sidecar
from sdxl_worker.download.inspection import file_sha256
from sdxl_worker.download.parallel import resolve_loras
from sdxl_worker.download.references import parse_reference
from sdxl_worker.errors import LoraFileError, LoraNotFound
from sdxl_worker.job.infotext import UsedLora
from sdxl_worker.job.jobs import JobRun
from sdxl_worker.lora.engine import AppliedLora, LoraEngine, ParsedLora
from sdxl_worker.request import LoraFile, LoraSpec
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadyLora:
    """One entry of the request with its file and its content, which no longer needs the file."""

    spec: LoraSpec
    file: LoraFile
    parsed: ParsedLora

    @property
    def used(self) -> UsedLora:
        """What the picture's text says of it."""
        return UsedLora(self.file.name, self.spec.scale, self.file.sha256)

    def as_json(self, applied: AppliedLora) -> dict[str, Any]:
        """The entry of the answer's `loras`, without what the file does not say."""
        facts = self.parsed.facts
        entry = {
            "name": self.file.name,
            "scale": self.spec.scale.as_json(),
            "sha256": self.file.sha256,
            "format": facts.format,
            "base_model": facts.base_model,
            "rank": facts.rank,
            "layers_applied": applied.layers,
            "trigger_words": list(facts.trigger_words),
        }
        return {name: value for name, value in entry.items() if value not in (None, [])}

    def warnings(self, applied: AppliedLora) -> list[str]:
        """What to tell the caller about this entry."""
        return [f"loras[{self.spec.index}]: {warning}" for warning in applied.warnings]


def make_ready(
    specs: Sequence[LoraSpec], settings: Settings, engine: Callable[[], LoraEngine], run: JobRun
) -> list[ReadyLora]:
    """The entries that have an effect, in order. An entry of scale 0 only has to be a reference; it costs nothing more.

    `engine` is called when there is something to read. Raises LoraDownloadError, LoraFileError and Cancelled.
    """
    for spec in specs:
        parse_reference(spec.reference, settings)
    wanted = [spec for spec in specs if not spec.scale.is_zero]
    if not wanted:
        return []
    references = [spec.reference for spec in wanted]
    try:
        files, parsed = _fetch_and_read(references, settings, engine(), run)
    except _StaleCache:
        # Evicted or damaged between the look into the cache and the reading: once more, from its source.
        files, parsed = _fetch_and_read(references, settings, engine(), run)
    run.facts["loras"] = [file.reference for file in files]
    run.facts["cache_hits"] = sum(file.cached for file in files)
    return [ReadyLora(*ready) for ready in zip(wanted, files, parsed, strict=True)]


class _StaleCache(LoraNotFound):
    """A cached file was gone or damaged when it was read."""


def _fetch_and_read(
    references: Sequence[str], settings: Settings, engine: LoraEngine, run: JobRun
) -> tuple[list[LoraFile], list[ParsedLora]]:
    with run.stage("downloading"):
        files = resolve_loras(references, settings, run.report_bytes, run.should_stop)
    with run.stage("loading_loras"), in_use([file.path for file in files]):
        parsed = []
        for file in files:
            run.check_stop()
            parsed.append(_read(engine, file))
    return files, parsed


def _read(engine: LoraEngine, file: LoraFile) -> ParsedLora:
    try:
        return engine.read(file.path)
    except FileNotFoundError as error:
        raise _StaleCache(f"{file.reference} vanished from the cache") from error
    except LoraFileError as error:
        if _is_damaged(file.path, file.sha256):
            quarantine(file.path)
            raise _StaleCache(f"{file.reference} was damaged in the cache") from error
        raise


def _is_damaged(path: Path, sha256: str) -> bool:
    """True for a file of ours whose bytes are not those that passed the checks; one put there by hand is not ours."""
    sidecar = read_sidecar(path)
    try:
        return sidecar is not None and not sidecar[0].by_hand and file_sha256(path) != sha256
    except OSError:
        return True
