"""A diffusers repo on the Hub: the cache that has all of it, the files that are needed, and their download."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sdxl_worker.assets.sources.hub import HubReference
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.repo_progress import reporting_bar
from sdxl_worker.logs import take_over_hub_log
from sdxl_worker.settings import Settings

logger = logging.getLogger(__name__)

# RunPod's "cached models" feature puts a Hub repo here, in the Hub's own cache layout, before the worker starts.
RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
ATTEMPTS = 5
RETRY_S = 2.0
_TEXT = (".json", ".txt", ".model")
# The first kind of weight file that a component has is taken; other precisions, EMA copies and frameworks are not.
_STEM, _SHARD = r"(model|diffusion_pytorch_model|pytorch_model)", r"(-\d+-of-\d+)?"
_WEIGHT_KINDS = tuple(
    re.compile(_STEM + _SHARD + precision + suffix)
    for suffix in (r"\.safetensors", r"\.bin")
    for precision in (rf"\.fp16{_SHARD}", "")
)

OnProgress = Callable[..., None] | None
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a variable asks for: the file that marks its folder, the folders of a pipeline repo that are downloaded, and
    those that have to hold weights."""

    variable: str
    index: str
    folders: frozenset[str] = frozenset()
    models: tuple[str, ...] = ()


BASE_MODEL = Wanted(
    "MODEL_ID",
    "model_index.json",
    frozenset({"scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae"}),
    ("unet", "vae", "text_encoder", "text_encoder_2"),
)
# Text encoder and VAE are those of the base model.
REFINER = Wanted("REFINER_ID", "model_index.json", frozenset({"scheduler", "unet"}), ("unet",))


def find_repo(
    reference: HubReference, wanted: Wanted, settings: Settings, runpod_cache: Path, on_progress: OnProgress
) -> Path:
    """The repo's folder on this disk, downloaded where it is not there; raises ModelUnavailable."""
    found = snapshot_here(reference, wanted, runpod_cache)
    if found is not None:
        return found
    logger.warning("%s is on no local disk; downloading it", reference.shown)
    return _download_repo(reference, wanted, settings, on_progress or (lambda *_: None))


def snapshot_here(reference: HubReference, wanted: Wanted, runpod_cache: Path) -> Path | None:
    """The repo's folder in RunPod's cache or the user's own, if it is complete there; no network."""
    found = (cached_snapshot(reference, wanted, cache) for cache in (runpod_cache, None))
    return next((folder for folder in found if folder is not None), None)


def cached_snapshot(reference: HubReference, wanted: Wanted, cache: Path | None) -> Path | None:
    """The snapshot folder of a repo in a Hub cache (None = the user's own) if it is complete; no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(reference.repo, wanted.index, cache_dir=cache, revision=reference.revision)
    folders = [Path(found).parent] if isinstance(found, str) else []
    if not folders and cache is not None and reference.revision == "main":
        # A cache that was filled without refs/main: the only snapshot there is.
        snapshots = cache / f"models--{reference.repo.replace('/', '--')}" / "snapshots"
        folders = [path.parent for path in snapshots.glob(f"*/{wanted.index}")]
    complete = [folder for folder in folders if is_complete(folder, wanted)]
    return complete[0] if len(complete) == 1 else None


def is_complete(folder: Path, wanted: Wanted = BASE_MODEL) -> bool:
    """True when no component lacks its weights, as an interrupted download leaves it."""
    holders = [folder / name for name in wanted.models] if (folder / "model_index.json").is_file() else [folder]
    return all(any(holder.glob("*.safetensors")) or any(holder.glob("*.bin")) for holder in holders)


def needed_files(names: list[str], wanted: Wanted = BASE_MODEL) -> list[str]:
    """The files of a repo that loading in half precision takes: configs, tokenizers, one set of weights per component.

    A pipeline repo has a model_index.json and a folder per component; a VAE repo is one component at its root.
    """
    is_pipeline = "model_index.json" in names
    components: dict[str, list[str]] = {}
    for name in names:
        folder = str(PurePosixPath(name).parent)
        if folder in wanted.folders if is_pipeline else folder == ".":
            components.setdefault(folder, []).append(name)
    chosen = ["model_index.json"] if is_pipeline else []
    for files in components.values():
        chosen += [name for name in files if name.endswith(_TEXT)]
        chosen += _weights(files)
    return sorted(chosen)


def _weights(files: list[str]) -> list[str]:
    for kind in _WEIGHT_KINDS:
        if found := [name for name in files if kind.fullmatch(PurePosixPath(name).name)]:
            return found
    return []


def _download_repo(
    reference: HubReference, wanted: Wanted, settings: Settings, on_progress: Callable[..., None]
) -> Path:
    from huggingface_hub import HfApi, get_token, try_to_load_from_cache

    take_over_hub_log()
    endpoint = settings.hf_endpoint.rstrip("/")
    api = HfApi(endpoint=endpoint, token=settings.hf_token or get_token() or False)

    def download() -> Path:
        info = api.model_info(reference.repo, revision=reference.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        names = needed_files(list(sizes), wanted)
        here = [
            name for name in names if isinstance(try_to_load_from_cache(reference.repo, name, revision=info.sha), str)
        ]
        bar = reporting_bar(on_progress, sum(sizes[name] for name in here), sum(sizes[name] for name in names))
        # By branch name, so that the cache notes which commit the branch is at.
        folder = api.snapshot_download(
            reference.repo, revision=reference.revision, allow_patterns=names, tqdm_class=bar
        )
        return Path(folder)

    folder = _with_retries(download, reference, wanted.variable)
    if not is_complete(folder, wanted):
        raise ModelUnavailable(f"{reference.shown} is not a diffusers model; set {wanted.variable} to one")
    return folder


def _with_retries(download: Callable[[], T], reference: HubReference, variable: str) -> T:
    from huggingface_hub import errors

    attempt = 0
    while True:
        attempt += 1
        try:
            return download()
        except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            hint = f"check {variable}, or set HF_TOKEN if it is private or gated"
            raise ModelUnavailable(f"{reference.shown} does not exist or is not accessible: {hint}") from None
        except Exception as error:  # the Hub client raises errors of several HTTP libraries and of the disk
            logger.warning("downloading %s failed (%s)", reference.shown, type(error).__name__)
            if attempt == ATTEMPTS or isinstance(error, errors.OfflineModeIsEnabled):
                hint = f"run python download_weights.py with a network, or set {variable} to a local folder"
                raise ModelUnavailable(f"{reference.shown} is not here and cannot be downloaded: {hint}") from None
        time.sleep(RETRY_S * attempt)
