"""LoRA reference -> checked local file: the cache first, then one download, published whole or not at all."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.cache import (
    Entry,
    Sidecar,
    in_use,
    look_up,
    prepare_folder,
    publish,
    quarantine,
    read_sidecar,
    temporary_file,
    write_sidecar,
)
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.eviction import evict, evict_down_to
from sdxl_worker.assets.fetch import Progress, fetch_to
from sdxl_worker.assets.inspection import (
    add_metadata,
    check_file,
    file_sha256,
    is_pickle,
    max_lora_bytes,
    pickle_to_safetensors,
)
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.located import Located
from sdxl_worker.assets.locks import turn_to_download
from sdxl_worker.assets.references import (
    CachedReference,
    CivitaiReference,
    HubReference,
    Reference,
    UrlReference,
    parse_reference,
    reference_key,
)
from sdxl_worker.assets.sources import civitai, hub
from sdxl_worker.assets.sources.local import described, open_by_hand
from sdxl_worker.assets.spare import spare_folder, spare_path
from sdxl_worker.errors import (
    AssetFileError,
    CacheWriteError,
    FetchFailed,
    FetchIncomplete,
    FetchTimeout,
    WorkerError,
)
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

# A branch, a tag or "the newest version" is asked for again this many seconds after it was last looked up ...
RECHECK_S = 600.0
# ... and after this many when the host could not be reached.
RETRY_UNREACHABLE_S = 60.0
# How much temporary space LoRAs may take when the cache folder cannot be written and LORA_CACHE_MAX_GB says nothing.
SPARE_MAX_GB = 8.0
MAX_PEFT_CONFIG = 256 * 1024

_UNREACHABLE = (FetchFailed, FetchTimeout, FetchIncomplete)
_LOCATE: dict[type, Callable[[Any, Settings, Budget], Located]] = {
    UrlReference: lambda reference, _settings, _budget: Located(Target(reference.url), suffix=_url_suffix(reference)),
    HubReference: hub.locate,
    CivitaiReference: civitai.locate,
}
_unreachable_since: dict[str, float] = {}


@dataclass(frozen=True)
class _Task:
    """One reference on its way into the cache."""

    reference: Reference
    key: str
    settings: Settings
    budget: Budget
    on_progress: Progress | None

    def path_in(self, folder: Path) -> Path:
        return folder / self.reference.file_name


def resolve_lora(
    text: str,
    settings: Settings,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> AssetFile:
    """The checked local file for any reference form of DESIGN section 3, downloaded when the cache has none.

    `on_progress(bytes_done, total or None)` is called at most a few times a second. Raises FetchError and
    AssetFileError subclasses, and Cancelled once `should_stop()` is true.
    """
    reference = parse_reference(text, settings)
    budget = Budget.start(settings.download_timeout, should_stop)
    budget.check()
    if isinstance(reference, CachedReference):
        return _lora_file(open_by_hand(reference, settings), reference, cached=True)
    task = _Task(reference, reference_key(reference), settings, budget, on_progress)
    path = task.path_in(settings.lora_cache_dir)
    entry = _fresh_entry(task, path)
    if entry is not None:
        return _lora_file(entry, reference, cached=True)
    with turn_to_download(path, budget, lambda: _fresh_entry(task, path) is not None):
        entry, cached = _settle(task, path)
    if not cached:
        evict(settings)
    return _lora_file(entry, reference, cached=cached)


def _lora_file(entry: Entry, reference: Reference, *, cached: bool) -> AssetFile:
    sidecar = entry.sidecar
    autov3 = str(sidecar.facts.get("autov3", ""))
    return AssetFile(entry.path, entry.path.name, reference.shown, sidecar.sha256, sidecar.size, cached, autov3)


def _fresh_entry(task: _Task, path: Path) -> Entry | None:
    """What the cache answers by itself, without a lock and without the network."""
    entry = look_up(path, task.key)
    if entry is None or not getattr(task.reference, "is_moving", False):
        return entry
    checked_at = max(entry.sidecar.checked_at, _unreachable_since.get(task.key, 0.0) + RETRY_UNREACHABLE_S - RECHECK_S)
    return entry if 0 <= time.time() - checked_at < RECHECK_S else None


def _settle(task: _Task, path: Path) -> tuple[Entry, bool]:
    """(entry, whether it was cached): look again now that it is our turn, then check for a newer one, then download."""
    entry = _fresh_entry(task, path)
    if entry is not None:
        return entry, True
    old = look_up(path, task.key) or _adopt(task, path) or look_up(task.path_in(spare_path()), task.key)
    if old is not None and not getattr(task.reference, "is_moving", False):
        return old, True
    try:
        located = _LOCATE[type(task.reference)](task.reference, task.settings, task.budget)
        if old is not None and located.identity == old.sidecar.identity:
            return write_sidecar(old.path, replace(old.sidecar, checked_at=time.time())), True
        return _download(task, located), False
    except _UNREACHABLE as error:
        if old is None:
            raise
        logger.warning("%s; using the cached file", error)
        _unreachable_since[task.key] = time.time()
        return old, True


def _adopt(task: _Task, path: Path) -> Entry | None:
    """A file whose sidecar is missing or out of step: taken when its bytes are good, else put into quarantine.

    That is how a worker leaves it that died between rename and sidecar, or a volume that was copied.
    """
    if not path.is_file() or path.is_symlink():
        return None
    read = read_sidecar(path)
    known = read[0] if read is not None and read[0].key == task.key else None
    if read is not None and known is None:
        return None  # another reference with the same short hash: this one replaces it
    found, sha256 = path.stat(), file_sha256(path)
    if known is not None and known.sha256 == sha256:
        return write_sidecar(path, replace(known, size=found.st_size, mtime_ns=found.st_mtime_ns))
    try:
        if known is not None:
            raise FetchIncomplete(f"{path.name} is not what was downloaded")
        facts = check_file(path)
    except (AssetFileError, FetchIncomplete):
        quarantine(path)
        return None
    sidecar = Sidecar(task.reference.shown, found.st_size, found.st_mtime_ns, sha256, task.key, **described(facts))
    return write_sidecar(path, sidecar)


def _download(task: _Task, located: Located) -> Entry:
    """Into the cache folder, or into temporary space of this worker when the folder cannot take the file."""
    try:
        return _download_into(task.settings.lora_cache_dir, task, located)
    except CacheWriteError as error:
        logger.warning("%s; using local temporary space for %s", error, task.reference.shown)
    folder = spare_folder()
    evict_down_to(folder, (task.settings.lora_cache_max_gb or SPARE_MAX_GB) * 1e9)
    try:
        return _download_into(folder, task, located)
    except CacheWriteError as error:
        raise CacheWriteError("neither the LoRA cache nor local temporary space can take the file") from error


def _download_into(folder: Path, task: _Task, located: Located) -> Entry:
    path = task.path_in(folder)
    with temporary_file(folder, path.name) as (temporary, handle):
        max_bytes = max_lora_bytes(task.settings)
        fetched = fetch_to(
            handle, located.target, max_bytes=max_bytes, budget=task.budget, on_progress=task.on_progress
        )
        if located.sha256 and located.sha256 != fetched.sha256:
            raise FetchFailed(f"{task.reference.shown} arrived damaged: its sha256 is not the announced one")
        sidecar = Sidecar(
            task.reference.shown,
            fetched.size,
            0,
            fetched.sha256,
            task.key,
            identity=located.identity,
            checked_at=time.time(),
        )
        if is_pickle(temporary) or located.peft_config:
            return _publish_rewritten(temporary, path, sidecar, located, task.budget)
        return publish(temporary, path, replace(sidecar, **described(check_file(temporary))))


def _publish_rewritten(source: Path, path: Path, sidecar: Sidecar, located: Located, budget: Budget) -> Entry:
    """A pickle as safetensors, a PEFT adapter with its settings: what is published then has a sha256 of its own."""
    with temporary_file(path.parent, path.name) as (converted, _), temporary_file(path.parent, path.name) as (final, _):
        was_pickle = is_pickle(source)
        if was_pickle:
            pickle_to_safetensors(source, converted, located.suffix)
            source = converted
        metadata = _peft_metadata(located.peft_config, budget) if located.peft_config else {}
        add_metadata(source, final, metadata)
        facts = check_file(final)
        if was_pickle:
            # Others know a pickle by the hash of the whole file.
            facts["autov3"] = sidecar.sha256[:12]
        return publish(final, path, replace(sidecar, sha256=file_sha256(final), **described(facts)))


def _peft_metadata(target: Target, budget: Budget) -> dict[str, str]:
    """adapter_config.json under the name that diffusers gives it in a file's metadata."""
    config = io.BytesIO()
    fetch_to(config, target, max_bytes=MAX_PEFT_CONFIG, budget=budget)
    return {"lora_adapter_metadata": config.getvalue().decode("utf-8", "replace")}


def _url_suffix(reference: UrlReference) -> str:
    """The announced kind; "" for a download link without a file name."""
    name = Path(reference.url.partition("?")[0]).name
    return Path(name).suffix.lower()


class AssetStore:
    """References to checked local files, for every kind of asset: one cache, one fetch, one table of sources."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def path_of(self, reference: str, kind: Kind) -> Path:
        """Where the cache keeps the file of `reference`, there or not; no network. Raises BadReference."""
        with kind.own_codes():
            return kind.folder(self.settings) / parse_reference(reference, self.settings).file_name

    def get(
        self,
        reference: str,
        kind: Kind,
        on_progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> AssetFile:
        """The checked local file of `reference`, from the cache or downloaded into it.

        `on_progress(bytes_done, total or None)` is called at most a few times a second; `should_stop()` is asked at
        every chunk and every wait. Raises FetchError and AssetFileError with the kind's codes, and Cancelled.
        """
        with kind.own_codes():
            return resolve_lora(reference, self.settings, on_progress, should_stop)

    def get_all(
        self,
        references: Sequence[str],
        kind: Kind,
        on_progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[AssetFile]:
        """`get` for several references at once, in order; `on_progress` gets the sums.

        The first error is raised and stops the other downloads.
        """
        from sdxl_worker.assets.parallel import resolve_loras

        with kind.own_codes():
            return resolve_loras(references, self.settings, on_progress, should_stop)

    def preload(self, references: Sequence[str], kind: Kind) -> list[AssetFile]:
        """The files of `references`; one that fails is logged with its code and left out."""
        from sdxl_worker.assets.parallel import preload

        def tell(error: Exception) -> None:
            if isinstance(error, WorkerError):
                logger.error("preload: %s: %s", error.code, error)
            else:
                logger.error("preload: one %s failed", kind.name, exc_info=error)

        return preload(references, lambda reference: self.get(reference, kind), tell)

    def prepare(self) -> None:
        """Create the cache folder and remove what dead workers left behind. Called when the worker starts."""
        prepare_folder(self.settings.lora_cache_dir, download_timeout=self.settings.download_timeout)

    @contextlib.contextmanager
    def in_use(self, files: Sequence[AssetFile]) -> Iterator[None]:
        """Keep this worker from evicting `files` for as long as a job needs them."""
        with in_use([file.path for file in files]):
            yield

    def set_aside_if_damaged(self, file: AssetFile) -> bool:
        """True for a file of ours whose bytes are not those that passed the checks: it is in quarantine then.

        One that was put there by hand is not ours.
        """
        sidecar = read_sidecar(file.path)
        try:
            damaged = sidecar is not None and not sidecar[0].by_hand and file_sha256(file.path) != file.sha256
        except OSError:
            damaged = True
        if damaged:
            quarantine(file.path)
        return damaged
