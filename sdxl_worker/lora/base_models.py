"""Which base model a LoRA was trained for, told from tensor names and shapes first and from metadata second."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sdxl_worker.lora.formats import input_width
from sdxl_worker.lora.keys import UNET, FileKeys, split_module

SDXL = "SDXL"
UNKNOWN = "unknown"

Shapes = Mapping[str, Sequence[int]]

_BLOCKS = r"(?:^|[._])blocks[._]\d+[._]"
_JOINT_ATTENTION = r"transformer_blocks[._](\d+)[._]attn[._](?:add_[qkv]_proj|to_[qkv]$)"
# Parts of names that only one family of models has, in the styles of diffusers, kohya and the model's own repository.
# Where a file has several, the first family here that occurs in it counts.
_FOREIGN = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("HiDream", r"(?:double|single)_stream_blocks[._]"),
        ("AuraFlow", r"joint_transformer_blocks[._]"),
        ("Flux", r"single_transformer_blocks?[._]|double_blocks[._]|single_blocks[._]|double_stream_modulation"),
        ("Stable Diffusion 3", r"joint_blocks[._]|context_block[._]|lora_te3_|text_encoder_3[._]|t5xxl"),
        ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)"),
        (
            "Krea 2",
            rf"{_BLOCKS}(?:attn[._]w[qkvo]|mlp[._](?:gate|up|down))(?![a-z])|txt_?fusion|text_fusion"
            r"|transformer_blocks[._]\d+[._](?:attn[._]to_gate|ff[._](?:gate|up|down))(?![a-z_])",
        ),
        (
            "Anima or Cosmos-Predict2",
            rf"{_BLOCKS}(?:(?:cross|self)_attn[._](?:[qkv]|output)_proj|mlp[._]layer[12]|adaln_modulation_)|llm_adapter",
        ),
        (
            "Lumina or Z-Image",
            r"(?:noise|context)_refiner[._]\d|adaLN_modulation|feed_forward[._]w[123]"
            r"|layers[._]\d+[._]attention[._](?:to_[qkvo]|qkv|out)",
        ),
        ("Wan", rf"{_BLOCKS}(?:cross_attn|self_attn|ffn)[._]|^(?:transformer\.)?blocks\.\d+\.attn[12]\."),
        ("Stable Cascade", r"lora_prior_|prior_unet|effnet"),
        ("PixArt", r"caption_projection|adaln_single"),
    )
)
_ANY_FOREIGN = re.compile("|".join(pattern.pattern for _, pattern in _FOREIGN))
# Families that share diffusers' names for joint attention, by its width.
_JOINT_WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3", 6144: "Krea 2"}
_FLUX_DOUBLE_BLOCKS = 19

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
    foreign = foreign_model((*keys.unknown, *keys.modules)) or _from_joint_attention(keys, shapes)
    return foreign or _from_modules(keys, shapes) or _from_metadata(metadata) or UNKNOWN


def foreign_model(names: Iterable[str]) -> str | None:
    """The model other than SDXL that names of tensors or modules give away, or None."""
    telling = [name for name in names if _ANY_FOREIGN.search(name)]
    return next((family for family, pattern in _FOREIGN if _any(pattern, telling)), None)


def _from_joint_attention(keys: FileKeys, shapes: Shapes) -> str | None:
    """The family of a diffusion transformer of which nothing but its attention was trained."""
    found = {module: match for module in keys.modules if (match := re.search(_JOINT_ATTENTION, module))}
    widths = {_width(keys.modules[module], shapes) for module in found}
    if 3072 in widths:
        if _any(re.compile("ff_context|norm1_context"), keys.modules):
            return "Flux"
        many = any(int(match[1]) >= _FLUX_DOUBLE_BLOCKS for match in found.values())
        return "Qwen-Image" if many else "Qwen-Image or Flux"
    return next((family for width, family in _JOINT_WIDTHS.items() if width in widths), None)


def _width(roles: Mapping[str, str], shapes: Shapes) -> int | None:
    return input_width({role: shapes[key] for role, key in roles.items()})


def _from_modules(keys: FileKeys, shapes: Shapes) -> str | None:
    located = [(module, *split_module(module)) for module in keys.modules]
    aliases = [alias for _, component, alias in located if component == UNET]
    for module, component, alias in located:
        if component == UNET and re.search(r"attn2_to_[kv]$", alias):
            width = _width(keys.modules[module], shapes)
            if width in _CROSS_ATTENTION_WIDTHS:
                return _CROSS_ATTENTION_WIDTHS[width]
    # Only SD 1 and 2 have one text encoder, which kohya then calls `te` without a number.
    single_encoder = [module for module in keys.modules if module.startswith("lora_te_text_model_")]
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
