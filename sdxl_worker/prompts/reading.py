"""A prompt's text -> what both text encoders will be given, found with their tokenizers alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.chunks import CHUNK_PLACES, Chunk, chunks_of, first_chunk, items_of
from sdxl_worker.prompts.parse import ParsedPrompt, parse
from sdxl_worker.prompts.vectors import ENCODERS, Embeddings
from sdxl_worker.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

MAX_CHUNKS = 20
NEGATIVE = "negative_prompt"


@dataclass(frozen=True)
class ReadPrompt:
    """The pieces of a prompt, and its chunks by text encoder: as many for each of them.

    `has_vectors` says that some of its words stand for vectors, whether the chunks hold them or they were cut off.
    """

    parsed: ParsedPrompt
    chunks: Mapping[str, tuple[Chunk, ...]]
    has_vectors: bool = False

    @property
    def length(self) -> int:
        """How many chunks."""
        return len(next(iter(self.chunks.values())))

    @property
    def as_stock(self) -> str | None:
        """The text that diffusers reads to the same effect; None when it cannot."""
        is_stock = self.parsed.is_plain and self.length == 1 and not self.has_vectors
        return self.parsed.pieces[0].text if is_stock else None


def tokenizers_of(pipeline: StableDiffusionXLPipeline) -> dict[str, Any]:
    """Each text encoder's tokenizer, by the encoder's name: copies, which the pipeline carries along.

    A refiner has the second alone. A fast tokenizer holds padding and truncation as state, which each call sets
    (`set_truncation_and_padding`). One job reads its prompts while another renders: with the same tokenizer it would
    take the padding from under diffusers.
    """
    pairs = zip(ENCODERS, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True)
    own = {encoder: tokenizer for encoder, tokenizer in pairs if tokenizer is not None}
    carried: tuple[dict[str, Any], dict[str, Any]] | None = vars(pipeline).get("_reading_tokenizers")
    # The originals are kept beside the copies: a tokenizer that was exchanged since then is copied anew.
    if carried is None or any(one is not other for one, other in zip(carried[0].values(), own.values(), strict=True)):
        carried = (own, copy.deepcopy(own))
        vars(pipeline)["_reading_tokenizers"] = carried
    return carried[1]


def read(text: str, syntax: str, tokenizers: Mapping[str, Any], embeddings: Embeddings) -> ReadPrompt:
    """`text` under `syntax`: "plain" keeps what fits into one chunk, as diffusers does; "a1111" keeps all.

    Raises InvalidRequest when it takes more than 20 chunks.
    """
    parsed = parse(text, syntax)
    chunks, has_vectors = {}, False
    for encoder, tokenizer in tokenizers.items():
        items = list(items_of(parsed.pieces, tokenizer, encoder, embeddings))
        has_vectors = has_vectors or any(item is not None and item.vectors is not None for item in items)
        chunks[encoder] = first_chunk(items) if syntax == "plain" else chunks_of(items, tokenizer)
    length = max(map(len, chunks.values()))
    if length > MAX_CHUNKS:
        raise InvalidRequest(f"takes {length} chunks of {CHUNK_PLACES} tokens and may take at most {MAX_CHUNKS}")
    # SDXL's two tokenizers give the same; where a checkpoint's do not, the shorter one has nothing more to say.
    return ReadPrompt(
        parsed, {name: (*found, *[Chunk()] * (length - len(found))) for name, found in chunks.items()}, has_vectors
    )


def read_prompts(
    request: GenerationRequest, tokenizers: Mapping[str, Any], embeddings: Embeddings
) -> tuple[tuple[ReadPrompt, ...], ReadPrompt | None]:
    """The prompt, or one for each picture, and the negative prompt, None when there is none.

    Raises InvalidRequest, naming the field at fault.
    """
    found = {}
    for name, text in texts_of(request).items():
        try:
            found[name] = read(text, syntax_of(request), tokenizers, embeddings)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name} {error}") from None
    negative = found.pop(NEGATIVE, None)
    return tuple(found.values()), negative


def texts_of(request: GenerationRequest) -> dict[str, str]:
    """The prompts that the request has, by the names of their fields; NEGATIVE, where it is there, is the last."""
    many = {f"prompts[{index}]": prompt for index, prompt in enumerate(request.prompts)}
    negative = {} if request.negative_prompt is None else {NEGATIVE: request.negative_prompt}
    return (many or {"prompt": request.prompt}) | negative


def syntax_of(request: GenerationRequest) -> str:
    """How the request's prompts are to be read; a request that was made directly and does not say it: plainly."""
    return request.prompt_syntax or "plain"
