"""Values in a request that have parts: entries of its lists before anything is downloaded, and lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

# 0.1 + 0.2 means 0.3; two hundredths of a step of the longest run are far more.
SPAN_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LoraScale:
    """How strongly a LoRA is applied to each part of the model, -100 to 100; 0 = not at all, negative = inverted."""

    unet: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float = 1.0

    @classmethod
    def uniform(cls, scale: float) -> LoraScale:
        """The same number for every part."""
        return cls(scale, scale, scale)

    @property
    def is_zero(self) -> bool:
        """True when the LoRA would have no effect at all."""
        return self.unet == self.text_encoder == self.text_encoder_2 == 0

    def as_json(self) -> float | dict[str, float]:
        """A plain number when all parts agree, as most requests have it; else one number per part."""
        if self.unet == self.text_encoder == self.text_encoder_2:
            return self.unet
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}


@dataclass(frozen=True)
class LoraSpan:
    """The steps at which a LoRA acts: from `start`, included, to `end`, excluded, as shares of the steps, 0 to 1."""

    start: float = 0.0
    end: float = 1.0

    @property
    def is_whole(self) -> bool:
        """True when the LoRA acts at every step."""
        return self.start <= 0 and self.end >= 1

    def covers(self, done: float) -> bool:
        """Whether the LoRA acts at the step before which `done`, 0 to below 1, of the steps lies behind."""
        return self.start - SPAN_TOLERANCE <= done < self.end - SPAN_TOLERANCE

    def as_json(self) -> dict[str, float]:
        """Nothing where the LoRA acts at every step, as in most requests."""
        return {} if self.is_whole else {"start": self.start, "end": self.end}


@dataclass(frozen=True)
class LoraSpec:
    """One entry of the request's `loras`, before anything is downloaded. `index` is its place in the request.

    `name` is a file name without a folder, under which the file is kept as well; empty = only under the worker's own.
    `tag` is how sentences call a LoRA that a tag in the prompt names, and which has no place in `loras`.
    """

    reference: str
    scale: LoraScale = field(default_factory=LoraScale)
    index: int = 0
    name: str = ""
    tag: str = ""
    span: LoraSpan = LoraSpan()

    @property
    def label(self) -> str:
        """What sentences call it."""
        return f"the tag {self.tag}" if self.tag else f"loras[{self.index}]"


@dataclass(frozen=True)
class EmbeddingSpec:
    """One entry of the request's `embeddings`, before anything is downloaded. `index` is its place in the request.

    `token` is what stands for it in a prompt; empty = the file's name without its ending.
    """

    reference: str
    token: str = ""
    index: int = 0

    @property
    def label(self) -> str:
        """What sentences call it."""
        return f"embeddings[{self.index}]"


@dataclass(frozen=True)
class Extend:
    """How many pixels are drawn beyond each side of the picture (outpainting)."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    @property
    def width(self) -> int:
        """What it adds to the picture's width."""
        return self.left + self.right

    @property
    def height(self) -> int:
        """What it adds to the picture's height."""
        return self.top + self.bottom


def default_strength(*, masked: bool, extended: bool) -> float:
    """How much is redrawn when the request does not say.

    0.3 is worker-sdxl's for a whole picture, 0.75 AUTOMATIC1111's for what is masked. Beyond the picture there is only
    a mirror image of it to start from: 0.9 keeps its colours and drowns what it shows.
    """
    return 0.9 if extended else 0.75 if masked else 0.3
