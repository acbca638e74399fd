"""A request's LoRAs made ready: fetched, read, and held in memory, before the device is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, FetchError, NotFound
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import LORA
from sdxl_worker.lora.engine import AppliedLora, LoraEngine, ParsedLora
from sdxl_worker.lora.used import UsedLora
from sdxl_worker.request import LoraSpec


@dataclass(frozen=True)
class ReadyLora:
    """One entry of the request with its file and its content, which no longer needs the file."""

    spec: LoraSpec
    file: AssetFile
    parsed: ParsedLora
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> UsedLora:
        """What the picture's text says of it."""
        return UsedLora(self.file.name, self.spec.scale, self.file.autov3 or self.parsed.autov3)

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
        return [f"loras[{self.spec.index}]: {warning}" for warning in (*self.notes, *applied.warnings)]


def make_ready(
    specs: Sequence[LoraSpec], assets: AssetStore, engine: Callable[[], LoraEngine], run: JobRun
) -> list[ReadyLora]:
    """The entries that have an effect, in order. An entry of scale 0 only has to be a reference; it costs nothing more.

    `engine` is called when there is something to read. Raises FetchError, AssetFileError and Cancelled.
    """
    for spec in specs:
        assets.path_of(spec.reference, LORA)
    wanted = [spec for spec in specs if not spec.scale.is_zero]
    if not wanted:
        return []
    references = [spec.reference for spec in wanted]
    try:
        files, parsed = _fetch_and_read(references, assets, engine(), run)
    except _StaleCache:
        # Evicted or damaged between the look into the cache and the reading: once more, from its source.
        files, parsed = _fetch_and_read(references, assets, engine(), run)
    run.facts["loras"] = [file.reference for file in files]
    run.facts["cache_hits"] = sum(file.cached for file in files)
    notes = [_keep_as(spec, file, assets) for spec, file in zip(wanted, files, strict=True)]
    return [ReadyLora(*ready) for ready in zip(wanted, files, parsed, notes, strict=True)]


def _keep_as(spec: LoraSpec, file: AssetFile, assets: AssetStore) -> tuple[str, ...]:
    """Give the file the name that the request has for it; what to tell the caller when that cannot be."""
    if spec.name in ("", spec.reference):
        return ()
    try:
        assets.keep_as(file, spec.name, LORA)
    except FetchError as error:
        return (f"it is not kept under its name: {error}",)
    return ()


class _StaleCache(NotFound):
    """A cached file was gone or damaged when it was read."""


def _fetch_and_read(
    references: Sequence[str], assets: AssetStore, engine: LoraEngine, run: JobRun
) -> tuple[list[AssetFile], list[ParsedLora]]:
    with run.stage("downloading"):
        files = assets.get_all(references, LORA, run.report_bytes, run.should_stop)
    with run.stage("loading_loras"), assets.in_use(files), LORA.own_codes():
        parsed = []
        for file in files:
            run.check_stop()
            parsed.append(_read(engine, file, assets))
    return files, parsed


def _read(engine: LoraEngine, file: AssetFile, assets: AssetStore) -> ParsedLora:
    try:
        return engine.read(file.path)
    except FileNotFoundError as error:
        raise _StaleCache(f"{file.reference} vanished from the cache") from error
    except AssetFileError as error:
        if assets.set_aside_if_damaged(file):
            raise _StaleCache(f"{file.reference} was damaged in the cache") from error
        raise
