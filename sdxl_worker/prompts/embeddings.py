"""A request's embeddings: the words of a prompt that stand for them, and what became of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_worker.prompts.reading import read_prompts
from sdxl_worker.prompts.vectors import ENCODERS, Vectors, VectorTable
from sdxl_worker.request import MAX_EMBEDDINGS, GenerationRequest
from sdxl_worker.text import shown

if TYPE_CHECKING:
    from sdxl_worker.assets.asset_file import AssetFile

# How CLIP's tokenizer takes a text apart before it looks into its vocabulary: runs of letters, single digits, and runs
# of what is neither.
_PARTS = re.compile(r"[^\W\d_]+|\d|(?:[^\w\s]|_)+")


@dataclass(frozen=True, eq=False)
class Embedding:
    """One embedding with its file: `token` stands for all `vectors` in a prompt, each of `more` for some of them.

    `label` is what sentences call it; `is_bundled` says that the file is a LoRA.
    """

    token: str
    vectors: VectorTable = field(repr=False)
    file: AssetFile
    label: str
    is_bundled: bool = False
    more: Mapping[str, VectorTable] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Mapping[str, VectorTable]:
        """Every text that stands for vectors."""
        return {**self.more, self.token: self.vectors}

    @property
    def short_hash(self) -> str:
        """What A1111 looks an embedding up by: 12 hex digits of its file's sha256."""
        return (self.file.source_sha256 or self.file.sha256)[:12]

    def as_json(self) -> dict[str, Any]:
        """The entry of the answer's `used_embeddings`."""
        return {
            "token": self.token,
            "name": self.file.name,
            "vectors": len(self.vectors[ENCODERS[0]]),
            "sha256": self.file.sha256,
        }


class PromptEmbeddings:
    """Finds the tokens of embeddings in prompts, as `vectors.Embeddings` says; `notes` are for the answer.

    A token is found where the tokenizer would see the same sequence of parts: upper and lower case are one, `cat` is
    not in `caterpillar`. Of tokens that begin at the same place the longest counts.
    """

    def __init__(self, embeddings: Iterable[Embedding]) -> None:
        """Of two with the same token the first one counts, and of more than 64 the first ones."""
        self.notes: list[str] = []
        self._owners: dict[str, Embedding] = {}
        self._vectors: dict[str, tuple[str, VectorTable]] = {}
        patterns: dict[str, str] = {}
        for embedding in embeddings:
            self._add(embedding, patterns)
        self.embeddings = tuple(dict.fromkeys(self._owners.values()))
        longest_first = sorted(patterns, key=lambda key: len(key), reverse=True)
        self._keys = dict(zip((f"t{index}" for index in itertools.count()), longest_first, strict=False))
        whole = "|".join(f"(?P<{group}>{patterns[key]})" for group, key in self._keys.items())
        self._pattern = re.compile(whole, re.IGNORECASE) if whole else None

    def _add(self, embedding: Embedding, patterns: dict[str, str]) -> None:
        if len(set(self._owners.values())) == MAX_EMBEDDINGS:
            self.notes.append(f"{embedding.label}: {shown(embedding.token)} is one embedding too many")
            return
        for token, vectors in embedding.tokens.items():
            key = _key(token)
            if key in self._owners:
                other = self._owners[key].label
                self.notes.append(f"{embedding.label}: the token {shown(token)} stands for the embedding of {other}")
                continue
            self._owners[key] = embedding
            self._vectors[key] = (token, vectors)
            patterns[key] = _pattern(token)

    def split(self, text: str, encoder: str) -> Iterator[str | Vectors]:
        """`text` in order: strings that are tokenised as they are, and vectors for the text encoder of that name."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > start:
                yield text[start : match.start()]
            token, vectors = self._vectors[self._keys[str(match.lastgroup)]]
            yield Vectors(token, vectors[encoder])
            start = match.end()
        if start < len(text) or not start:
            yield text[start:]

    def used_by(self, request: GenerationRequest, tokenizers: Mapping[str, Any]) -> tuple[Embedding, ...]:
        """Those that a prompt of the request uses, in their order; raises InvalidRequest like `prompts.applied`."""
        positives, negative = read_prompts(request, tokenizers, self)
        prompts = positives if negative is None else (*positives, negative)
        chunks = [chunk for prompt in prompts for chunk in prompt.chunks[ENCODERS[0]]]
        used = {self._owners[_key(vectors.name)] for chunk in chunks for _, vectors in chunk.vectors()}
        return tuple(embedding for embedding in self.embeddings if embedding in used)

    def notes_on(self, used: Sequence[Embedding]) -> list[str]:
        """What to tell the caller, with a sentence for each embedding that no prompt uses."""
        unused = [embedding for embedding in self.embeddings if embedding not in used]
        return self.notes + [
            f"{embedding.label}: no prompt uses the embedding {shown(embedding.token)}" for embedding in unused
        ]


def _key(token: str) -> str:
    """The same text for every way to write the same sequence of parts."""
    return " ".join(_PARTS.findall(token.lower()))


def _pattern(token: str) -> str:
    """Finds the parts of `token` in a row, white space between them or not, where no other part goes on."""
    parts = _PARTS.findall(token)
    between = [
        r"\s++" if first[-1].isalpha() and second[0].isalpha() else r"\s*+"
        for first, second in itertools.pairwise(parts)
    ]
    body = "".join(
        re.escape(part) + separator for part, separator in itertools.zip_longest(parts, between, fillvalue="")
    )
    return _edge(parts[0][0], before=True) + body + _edge(parts[-1][-1], before=False)


def _edge(letter: str, *, before: bool) -> str:
    """A letter or digit may not be one of a longer word or number; other signs may stand anywhere: `<s0><s1>`."""
    kind = r"[^\W\d_]" if letter.isalpha() else r"\d" if letter.isdigit() else ""
    return (f"(?<!{kind})" if before else f"(?!{kind})") if kind else ""
