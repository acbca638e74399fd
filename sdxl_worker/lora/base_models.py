"""Which base model a LoRA was trained for, told from tensor names and shapes first and from metadata second."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sdxl_worker.lora.formats import input_width
from sdxl_worker.lora.keys import UNET, FileKeys, split_module

SDXL = "SDXL"
UNKNOWN = "unknown"

Shapes = Mapping[str, Sequence[int]]

# Names only one family of models has, in the styles of diffusers, kohya and the model's own repository.
_FOREIGN_PATTERNS = (
    (r"single_transformer_blocks?[._]|double_blocks[._]|single_blocks[._]|double_stream_modulation", "Flux"),
    (r"joint_blocks[._]|context_block[._]", "Stable Diffusion 3"),
    (r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)", "Qwen-Image"),
    (r"transformer[._]transformer_blocks[._]\d+[._](?:attn[._]add_|ff_context|norm1_context)", "Stable Diffusion 3"),
    (r"(?:noise|context)_refiner[._]\d|adaLN_modulation|feed_forward[._]w[123]", "Lumina or Z-Image"),
    (r"(?:^|[._])blocks[._]\d+[._](?:cross_attn|self_attn|ffn)[._]", "Wan"),
    (r"lora_te3_|text_encoder_3[._]|t5xxl", "Stable Diffusion 3"),
    (r"lora_prior_|prior_unet|effnet", "Stable Cascade"),
    (r"caption_projection|adaln_single", "PixArt"),
)
_FOREIGN_NAMES = tuple((re.compile(pattern), name) for pattern, name in _FOREIGN_PATTERNS)

# Width of the text states that the UNet's cross-attention reads.
_CROSS_ATTENTION_WIDTHS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "the SDXL refiner",
    2048: SDXL,
}
# Attention where SDXL has none: SD 1 and 2 attend on the first and last level of a four-level UNet.
_OLD_UNET = re.compile(
    r"(?:down_blocks_0_attentions|up_blocks_3_|input_blocks_[12]_1_|input_blocks_1[01]_|output_blocks_(?:9|1[01])_)"
)
# More than one transformer block per attention is SDXL's own (2 and 10 of them).
_SDXL_UNET = re.compile(
    r"(?:attentions_\d|_blocks_\d+_1|middle_block_1)_transformer_blocks_[1-9]_|add_embedding|label_emb"
)
_METADATA = (
    (r"sd_?xl|stable-diffusion-xl|pony|illustrious|noobai", SDXL),
    (r"sd3|stable-diffusion-3", "Stable Diffusion 3"),
    (r"flux", "Flux"),
    (r"sd_v2|sd_2|stable-diffusion-v2|768-v", "Stable Diffusion 2"),
    (r"sd_v1|sd_1|sd1\.5|stable-diffusion-v1|v1-5", "Stable Diffusion 1.5"),
)
_METADATA_FIELDS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")


def detect_base_model(keys: FileKeys, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """A base model's name as people call it, or `unknown`. `shapes`: tensor name -> shape, for the whole file."""
    for name in (*keys.unknown, *keys.modules):
        for pattern, model in _FOREIGN_NAMES:
            if pattern.search(name):
                return model
    return _from_modules(keys, shapes) or _from_metadata(metadata) or UNKNOWN


def _from_modules(keys: FileKeys, shapes: Shapes) -> str | None:
    located = [(module, *split_module(module)) for module in keys.modules]
    aliases = [alias for _, component, alias in located if component == UNET]
    for module, component, alias in located:
        if component == UNET and re.search(r"attn2_to_[kv]$", alias):
            width = input_width({role: shapes[key] for role, key in keys.modules[module].items()})
            if width in _CROSS_ATTENTION_WIDTHS:
                return _CROSS_ATTENTION_WIDTHS[width]
    # Only SD 1 and 2 have one text encoder, which kohya then calls `te` without a number.
    single_encoder = [module for module in keys.modules if module.startswith("lora_te_")]
    if single_encoder or _any(_OLD_UNET, aliases):
        wide = any(1024 in shapes[key] for module in single_encoder for key in keys.modules[module].values())
        return "Stable Diffusion 2" if wide else "Stable Diffusion 1.5"
    if any(component != UNET and not _shared_with_sd1(module) for module, component, _ in located):
        return SDXL
    return SDXL if _any(_SDXL_UNET, aliases) else None


def _shared_with_sd1(module: str) -> bool:
    """The first text encoder is CLIP-L in SD 1.5 and in SDXL: one name, the same shapes."""
    return "text_encoder." in module or "clip_l." in module


def _any(pattern: re.Pattern[str], texts: Iterable[str]) -> bool:
    return any(pattern.search(text) for text in texts)


def _from_metadata(metadata: Mapping[str, str]) -> str | None:
    for field in _METADATA_FIELDS:
        for pattern, model in _METADATA:
            if re.search(pattern, metadata.get(field, "")[:200].lower()):
                return model
    return None
