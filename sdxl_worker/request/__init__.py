"""What a request may say: its fields, their values and lists, the rules between them, and how much drawing it asks for.

`fields` is the one list of the fields, `validation.validate_request` turns unknown JSON into a GenerationRequest.
"""

from sdxl_worker.request.fields import (
    DEFAULT_CLIP_SKIP,
    EMPHASIS_RULES,
    FIELDS,
    MAX_EMBEDDINGS,
    MAX_LORAS,
    MAX_SIDE,
    GenerationRequest,
)
from sdxl_worker.request.values import EmbeddingSpec, Extend, LoraScale, LoraSpan, LoraSpec

__all__ = [
    "DEFAULT_CLIP_SKIP",
    "EMPHASIS_RULES",
    "FIELDS",
    "MAX_EMBEDDINGS",
    "MAX_LORAS",
    "MAX_SIDE",
    "EmbeddingSpec",
    "Extend",
    "GenerationRequest",
    "LoraScale",
    "LoraSpan",
    "LoraSpec",
]
