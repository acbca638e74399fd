"""LoRA reference -> verified local file; and the command line that fills and tends the caches."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.eviction import list_cache, verify
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.report import file_facts, listed_json, write_facts, write_json, write_list, write_table
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import WorkerError
from sdxl_worker.generate.base_model import BaseModel, find_base_model, find_refiner
from sdxl_worker.generate.checkpoint_facts import read_checkpoint
from sdxl_worker.generate.vae_files import find_preview_vae, find_vae
from sdxl_worker.kinds import CHECKPOINT, EMBEDDING, LORA
from sdxl_worker.logs import masked
from sdxl_worker.masking import mask
from sdxl_worker.settings import Settings


def get_lora_cache_path(lora_source: str) -> Path:
    """Where the cache keeps the file of this reference, whether it is there or not; no network.

    Raises BadReference.
    """
    settings = Settings.from_environment()
    return AssetStore(settings).path_of(lora_source, LORA)


def download_lora(
    lora_source: str,
    on_progress: Callable[[int, int | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    settings: Settings | None = None,
) -> AssetFile:
    """The checked local file for a LoRA reference, from the cache or downloaded into it.

    `on_progress(bytes_done, total or None)` is called at most a few times a second; `should_stop()` is asked at every
    chunk and every wait. Raises FetchError and AssetFileError subclasses, and Cancelled.
    """
    return AssetStore(settings or Settings.from_environment()).get(lora_source, LORA, on_progress, should_stop)


def download_loras(
    sources: Sequence[str],
    on_progress: Callable[[int, int | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    settings: Settings | None = None,
) -> list[AssetFile]:
    """`download_lora` for several references at once, in order; `on_progress` gets the sums.

    The first error is raised and stops the other downloads.
    """
    return AssetStore(settings or Settings.from_environment()).get_all(sources, LORA, on_progress, should_stop)


class _Formatter(logging.Formatter):
    """Level and message, with secrets and the queries of URLs masked: they may end in the log of an image build."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__("%(levelname)s: %(message)s")
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record), self._secrets)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines between the bars of the same terminal, not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _configure_logging(secrets: Sequence[str]) -> None:
    """Log to standard error: this project's own lines from INFO on, those of libraries from WARNING on."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter(secrets))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("sdxl_worker"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 0 when everything asked for worked, else 1; a usage error exits with 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.inspect and not (options.lora or options.embedding or options.checkpoint):
        parser.error("--inspect goes with --lora, --embedding or --checkpoint REFERENCE")
    try:
        settings = Settings.from_environment()
        _configure_logging(settings.secrets)
        return next(act for name, act in _ACTIONS if getattr(options, name))(options, settings)
    except WorkerError as error:
        sys.stderr.write(f"error: {error.code}: {error}\n")
    except ValueError as error:  # a variable that cannot be read; the sentence names it
        sys.stderr.write(f"error: {error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing unfinished is left in the cache\n")
    return 1


_DESCRIPTION = """\
Without options: download the base model (MODEL_ID), the VAE (VAE_ID) and, where REFINER_ID and PREVIEW_VAE_ID
name them, the refiner and the VAE of the previews, as the image build does.
With --lora, --embedding, --list, --prune or --verify: fill, show or tend the cache of LoRAs and
embeddings (LORA_CACHE_DIR). With --checkpoint: get that base model; --inspect says what it is."""

_EPILOG = """\
a REFERENCE is
  a URL                  https://example.com/my-lora.safetensors
  a Hugging Face repo    user/repo, user/repo@revision, user/repo/file.safetensors
  on Civitai             a link, civitai:ID@VERSION, urn:air:sdxl:lora:civitai:ID@VERSION
  a file in the cache    my-lora.safetensors
and for a checkpoint also a local file, which is named with its folder or lies in the current one

examples
  python download_weights.py
  MODEL_ID=SG161222/RealVisXL_V5.0 python download_weights.py
  LORA_CACHE_DIR=.cache/loras python download_weights.py --lora user/repo civitai:12345@67890
  LORA_CACHE_DIR=.cache/loras python download_weights.py --lora user/repo --inspect
  python download_weights.py --checkpoint my-model.safetensors --inspect

environment: MODEL_ID, VAE_ID, PREVIEW_VAE_ID, REFINER_ID, LORA_CACHE_DIR, LORA_CACHE_MAX_GB, LORA_MAX_MB,
DOWNLOAD_TIMEOUT; HF_TOKEN and CIVITAI_API_TOKEN open private and gated files. README.md lists them all.

exit status: 0 when everything asked for worked, 1 when something failed (standard error says
what, with the code of README's error table), 2 when the options make no sense."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lora", metavar="REFERENCE", nargs="+", help="put LoRAs into the cache and print their facts")
    what.add_argument("--embedding", metavar="REFERENCE", nargs="+", help="the same for embeddings")
    what.add_argument(
        "--checkpoint", metavar="REFERENCE", nargs="+", help="the same for base models: whatever MODEL_ID may be"
    )
    what.add_argument("--list", action="store_true", help="show what is in the cache, the last used first")
    what.add_argument("--prune", action="store_true", help="evict down to LORA_CACHE_MAX_GB, empty the quarantine")
    what.add_argument("--verify", action="store_true", help="compare every sha256, quarantine what is damaged")
    parser.add_argument("--inspect", action="store_true", help="with these: also what the file says of its training")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(model=True)
    return parser


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    # disable=None: only where somebody is looking.
    # miniters=1: left to itself tqdm skips the steps that are smaller than those before, and with them the last one.
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, leave=False, miniters=1) as bar:

        def update(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.refresh()

        yield update


def _get_files(kind: Kind, references: Sequence[str], options: argparse.Namespace, settings: Settings) -> int:
    store = AssetStore(settings)
    store.prepare(kind)
    found = []
    for reference in references:
        with _progress_bar(mask(reference)) as update:
            found.append(file_facts(store.get(reference, kind, update), inspect=options.inspect))
        if not options.json:
            write_facts(found[-1])
    if options.json:
        write_json(found[0] if len(found) == 1 else found)
    return 0


def _get_loras(options: argparse.Namespace, settings: Settings) -> int:
    return _get_files(LORA, options.lora, options, settings)


def _get_embeddings(options: argparse.Namespace, settings: Settings) -> int:
    return _get_files(EMBEDDING, options.embedding, options, settings)


def _get_checkpoints(options: argparse.Namespace, settings: Settings) -> int:
    found = []
    for reference in options.checkpoint:
        with _progress_bar(mask(reference)) as update:
            model = find_base_model(replace(settings, model_id=reference), on_progress=update)
        facts: dict[str, Any] = {"reference": model.name, "kind": model.kind, "path": str(model.path or "")}
        if model.kind == "file" and model.path is not None:
            facts["size"] = model.path.stat().st_size
        found.append(facts | {"facts": _checkpoint_facts(model)} if options.inspect else facts)
        if not options.json:
            write_facts(found[-1])
    if options.json:
        write_json(found[0] if len(found) == 1 else found)
    return 0


def _checkpoint_facts(model: BaseModel) -> dict[str, Any]:
    """What the header of a single file says; a folder says it in its configs."""
    if model.kind != "file" or model.path is None:
        return {}
    with CHECKPOINT.own_codes():
        return read_checkpoint(model.path).as_json()


def _list(options: argparse.Namespace, settings: Settings) -> int:
    items = list_cache(settings.lora_cache_dir)
    if options.json:
        write_json([listed_json(item) for item in items])
    else:
        write_list(items)
    return 0


def _prune(options: argparse.Namespace, settings: Settings) -> int:
    removed = [path.name for path in AssetStore(settings).prune(LORA)]
    if options.json:
        write_json({"removed": removed})
    else:
        sys.stdout.write("".join(f"removed {name}\n" for name in removed) or "nothing to remove\n")
    return 0


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    verdicts = [(item.path.name, verdict) for item, verdict in verify(settings.lora_cache_dir)]
    if options.json:
        write_json([{"name": name, "verdict": verdict} for name, verdict in verdicts])
    else:
        write_table([("NAME", "VERDICT"), *verdicts])
    return int(any(verdict in ("quarantined", "changed", "unreadable") for _, verdict in verdicts))


def _get_base_model(options: argparse.Namespace, settings: Settings) -> int:
    with _progress_bar(mask(settings.model_id)) as update:
        model = find_base_model(settings, on_progress=update)
    vae = None
    if model.allow_vae_override:
        with _progress_bar(mask(settings.vae_id)) as update:
            vae = find_vae(settings, on_progress=update)
    refiner = None
    if settings.refiner_id:
        with _progress_bar(mask(settings.refiner_id)) as update:
            refiner = find_refiner(settings, on_progress=update)
    preview_vae = None
    if settings.preview_vae_id:
        with _progress_bar(mask(settings.preview_vae_id)) as update:
            preview_vae = find_preview_vae(settings, on_progress=update)
    facts = {
        "model": model.name,
        "kind": model.kind,
        "path": str(model.path or ""),
        "vae": str(vae or "the model's own"),
    }
    if refiner is not None:
        facts |= {"refiner": refiner.name, "refiner_path": str(refiner.path or "")}
    if preview_vae is not None:
        facts["preview_vae"] = str(preview_vae)
    if options.json:
        write_json(facts)
    else:
        write_table(list(facts.items()))
    return 0


_ACTIONS: tuple[tuple[str, Callable[[argparse.Namespace, Settings], int]], ...] = (
    ("lora", _get_loras),
    ("embedding", _get_embeddings),
    ("checkpoint", _get_checkpoints),
    ("list", _list),
    ("prune", _prune),
    ("verify", _verify),
    ("model", _get_base_model),
)

if __name__ == "__main__":
    sys.exit(main())
