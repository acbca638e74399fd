"""A request's embeddings made ready: fetched and read, before the device is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.reading import fetch_and_read
from sdxl_worker.assets.references import WEIGHT_SUFFIXES
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import EMBEDDING
from sdxl_worker.prompts.embedding_file import EmbeddingContent, read_embedding
from sdxl_worker.prompts.embeddings import Embedding
from sdxl_worker.request import EmbeddingSpec
from sdxl_worker.text import clean_text

# cog-sdxl's token map gives its embeddings.pti this name unless the trainer chose another one.
COG_TOKEN = "TOK"
_HASHED = re.compile(r"^(?:[0-9a-f]{12}_(?=.)|lora_[0-9a-f]{12}$)")


def make_ready(
    specs: Sequence[EmbeddingSpec], assets: AssetStore, widths: Sequence[int], run: JobRun
) -> list[Embedding]:
    """The embeddings of the request in order; `widths` are those of the text encoders.

    Raises FetchError, AssetFileError and Cancelled, and InvalidRequest where a token is missing or given twice.
    """
    if not specs:
        return []
    names = [assets.path_of(spec.reference, EMBEDDING).name for spec in specs]
    tokens = [spec.token or token_of(spec.reference, name) for spec, name in zip(specs, names, strict=True)]
    for spec, token in zip(specs, tokens, strict=True):
        if not token:
            raise InvalidRequest(f"{spec.label} needs a token: its reference does not name a file")
    files, contents = fetch_and_read(
        [spec.reference for spec in specs],
        EMBEDDING,
        assets,
        run,
        lambda file: read_embedding(file.path, widths),
        "loading_embeddings",
    )
    ready = zip(specs, tokens, files, contents, strict=True)
    return [_embedding(spec, token, file, content) for spec, token, file, content in ready]


def token_of(reference: str, name: str) -> str:
    """What stands for a file in a prompt unless the request says it: the file's name without its ending.

    `name` is the file's in the cache, which is taken where the reference itself names no file: a repo, for example.
    Empty when neither does.
    """
    path = reference.strip().partition("?")[0].partition("#")[0]
    last = unquote(path.rpartition("/")[2]) if "/" in path else path
    suffix = next((suffix for suffix in WEIGHT_SUFFIXES if last.lower().endswith(suffix)), "")
    is_cached = ":" not in path and ("/" not in path or path.startswith("/"))
    stem = last[: len(last) - len(suffix)] if suffix or is_cached else name.removesuffix(".safetensors")
    return clean_text(_HASHED.sub("", stem))


def _embedding(spec: EmbeddingSpec, token: str, file: AssetFile, content: EmbeddingContent) -> Embedding:
    if not content.separate:
        return Embedding(token, content.vectors, file, spec.label)
    count = len(next(iter(content.vectors.values())))
    numbers = {**content.token_map, **{f"<s{row}>": (row,) for row in range(count)}}
    more = {
        name: {encoder: vectors[list(rows)] for encoder, vectors in content.vectors.items()}
        for name, rows in numbers.items()
    }
    whole = next((name for name, rows in content.token_map.items() if rows == tuple(range(count))), COG_TOKEN)
    return Embedding(spec.token or whole, content.vectors, file, spec.label, more=more)
