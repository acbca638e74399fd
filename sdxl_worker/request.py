"""Frozen values that travel through one request: what was asked for, and what it was resolved to."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraScale:
    """How strongly a LoRA is applied to each part of the model: finite; 0 = not at all, negative = inverted."""

    unet: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float = 1.0

    @classmethod
    def uniform(cls, scale: float) -> "LoraScale":
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
class LoraSpec:
    """One entry of the request's `loras`, before anything is downloaded. `index` is its place in the request."""

    reference: str
    scale: LoraScale = field(default_factory=LoraScale)
    index: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """A validated job. Sizes are in pixels; `seed` is in [0, 2**64 - 1]; `strength` is used with `image_url` only.

    A negative prompt of None reaches the pipeline as None, which is not the same picture as "".
    """

    prompt: str
    negative_prompt: str | None = None
    height: int = 1024
    width: int = 1024
    seed: int = 0
    scheduler: str = "K_EULER_ANCESTRAL"
    num_inference_steps: int = 28
    guidance_scale: float = 5.5
    num_images: int = 1
    image_url: str | None = None
    strength: float = 0.3
    loras: tuple[LoraSpec, ...] = ()
    loras_requested: bool = False
    output_format: str = "png"
    output_quality: int = 90
    preview: bool = False
    warnings: tuple[str, ...] = ()
