"""A request's LoRAs made ready: fetched, read, and held in memory, before the device is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.reading import fetch_and_read
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import AssetFileError, FetchError, about
from sdxl_worker.few_step import FewStep, named, recognised
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import LORA
from sdxl_worker.lora.engine import AppliedLora, LoraEngine
from sdxl_worker.lora.parsed import ParsedLora
from sdxl_worker.lora.used import UsedLora
from sdxl_worker.prompts.embeddings import Embedding
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
        hash_name = self.file.autov3 or self.parsed.autov3
        return UsedLora(self.file.name, self.spec.scale, hash_name, in_prompt=bool(self.spec.tag))

    @property
    def few_step(self) -> FewStep | None:
        """What kind of few-step LoRA it is, by the names that it has here and in its metadata."""
        names = (self.spec.reference, self.spec.name, self.file.origin, self.file.name)
        return recognised(names) or named(self.parsed.facts.few_step)

    @property
    def embeddings(self) -> list[Embedding]:
        """Those that the file holds."""
        found = self.parsed.bundled.embeddings.items()
        return [Embedding(name, vectors, self.file, self.spec.label, is_bundled=True) for name, vectors in found]

    def as_json(self, applied: AppliedLora) -> dict[str, Any]:
        """The entry of the answer's `loras`, without what the file does not say."""
        facts = self.parsed.facts
        entry = {
            "name": self.file.name,
            "scale": self.spec.scale.as_json(),
            **self.spec.span.as_json(),
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
        return [f"{self.spec.label}: {warning}" for warning in (*self.notes, *applied.warnings)]


def make_ready(
    specs: Sequence[LoraSpec], assets: AssetStore, engine: Callable[[], LoraEngine], run: JobRun
) -> list[ReadyLora]:
    """The entries that have an effect, in order. An entry of scale 0 only has to be a reference; it costs nothing more.

    `engine` is called when there is something to read. Raises FetchError, AssetFileError and Cancelled.
    """
    for spec in specs:
        with _naming([spec]), about(spec.reference):
            assets.path_of(spec.reference, LORA)
    wanted = [spec for spec in specs if not spec.scale.is_zero]
    if not wanted:
        return []
    with _naming(wanted):
        files, parsed = fetch_and_read(
            [spec.reference for spec in wanted],
            LORA,
            assets,
            run,
            lambda file: engine().read(file.path),
            "loading_loras",
        )
    run.facts["loras"] = [file.reference for file in files]
    run.facts["cache_hits"] = sum(file.cached for file in files)
    for file, content in zip(files, parsed, strict=True):
        if not file.autov3:
            content.start_hashing()
    notes = [_keep_as(spec, file, assets) for spec, file in zip(wanted, files, strict=True)]
    return [ReadyLora(*ready) for ready in zip(wanted, files, parsed, notes, strict=True)]


@contextlib.contextmanager
def _naming(specs: Sequence[LoraSpec]) -> Iterator[None]:
    """An error about a LoRA that a tag names says so: the caller knows it by the tag only."""
    try:
        yield
    except (FetchError, AssetFileError) as error:
        named = [spec for spec in specs if spec.reference == error.reference]
        if named and all(spec.tag for spec in named):
            error.args = (f"{named[0].label}: {error}",)
        raise


def _keep_as(spec: LoraSpec, file: AssetFile, assets: AssetStore) -> tuple[str, ...]:
    """Give the file the name that the request has for it; what to tell the caller when that cannot be."""
    if spec.name in ("", spec.reference):
        return ()
    try:
        assets.keep_as(file, spec.name, LORA)
    except FetchError as error:
        return (f"it is not kept under its name: {error}",)
    return ()
