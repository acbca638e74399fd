"""Read and check a LoRA file: safetensors header, tensor values, what it is and what it was trained for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA file says of itself: tensor names and shapes first, metadata second; every text bounded and safe to show."""

    format: str
    base_model: str
    tensors: int
    modules: int
    rank: int | None = None
    alpha: float | None = None
    title: str = ""
    author: str = ""
    trigger_words: tuple[str, ...] = ()
    top_tags: tuple[tuple[str, int], ...] = ()
    resolution: str = ""
    trained_on: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, without what the file does not say."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", ())}


def check_lora_file(path: Path) -> LoraFacts:
    """Everything that can be checked without the base model: header, structure, finite values."""
    raise NotImplementedError


def is_sdxl(facts: LoraFacts) -> bool:
    """True when the LoRA was made for SDXL."""
    return facts.base_model == "SDXL"
