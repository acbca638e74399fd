"""The tensor names LoRA trainers write: what part of which module a key means.

A key is `<prefix><module><suffix>`: the suffix gives the tensor's role (`down`, `up`, `alpha`, `hada_w1_a`, ...) and
stands in the format's entry in `sdxl_worker.lora.formats`; the prefix gives the component (UNet or one of the text
encoders), and the module is written with dots or underscores, in diffusers' naming or in SDXL's own (input_blocks,
middle_block, output_blocks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sdxl_worker.lora.formats import SUFFIXES

UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"
COMPONENTS = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)

# Where a suffix may begin, and what it may be.
_START = re.compile(r"\.|_lora(?=\.)")
_SUFFIX = re.compile("|".join(f"(?P<{role}>{pattern})" for role, pattern in SUFFIXES.items()))
# Longer than any model's names, and short enough for every pattern.
MAX_NAME = 400

_WRAPPERS = re.compile(r"^(?:base_model\.model\.|_orig_mod\.|module\.)+")
# Longest first where one is the beginning of another.
_PREFIXES = (
    ("lora_unet_", UNET),
    ("lora_te1_", TEXT_ENCODER),
    ("lora_te2_", TEXT_ENCODER_2),
    ("oft_unet_", UNET),
    ("lycoris_", UNET),
    ("model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("unet.", UNET),
    ("text_encoders.clip_l.transformer.", TEXT_ENCODER),
    ("text_encoders.clip_g.transformer.", TEXT_ENCODER_2),
    ("text_encoder_2.", TEXT_ENCODER_2),
    ("text_encoder.", TEXT_ENCODER),
    ("clip_l.", TEXT_ENCODER),
    ("clip_g.", TEXT_ENCODER_2),
    ("te1.", TEXT_ENCODER),
    ("te2.", TEXT_ENCODER_2),
)

# OneTrainer: bundle_emb.NAME.clip_l, or bundle_emb.NAME.string_to_param.* as AUTOMATIC1111's own files have it.
EMBEDDING_PREFIX = "bundle_emb."
_STRING_TO_PARAM = ".string_to_param."


@dataclass(frozen=True)
class FileKeys:
    """A file's keys, sorted: `modules[module as written][role] = key`, of the bundled embeddings
    `bundled[name][part] = key`, and what is neither."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    bundled: dict[str, dict[str, str]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the bundled embeddings."""
        return tuple(self.bundled)

    @property
    def roles(self) -> set[str]:
        """Every role that occurs in the file."""
        return {role for roles in self.modules.values() for role in roles}


def sort_keys(keys: Mapping[str, Any] | list[str]) -> FileKeys:
    """Sort tensor names by module and role; a role given twice for one module counts as unknown."""
    modules: dict[str, dict[str, str]] = {}
    bundled: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        if key.startswith(EMBEDDING_PREFIX):
            name, part = _bundled(key)
            bundled.setdefault(name, {})[part] = key
            continue
        split = split_key(key)
        if split is None or split[1] in modules.get(split[0], ()):
            unknown.append(key)
        else:
            modules.setdefault(split[0], {})[split[1]] = key
    return FileKeys(modules, bundled, tuple(unknown))


def _bundled(key: str) -> tuple[str, str]:
    """(name, part) of a bundled embedding's tensor; the name may hold dots."""
    rest = key[len(EMBEDDING_PREFIX) :]
    separator = _STRING_TO_PARAM if _STRING_TO_PARAM in rest else "."
    name, _, part = rest.rpartition(separator)
    return name, part


def split_key(key: str) -> tuple[str, str] | None:
    """`(module as written, role)` of a tensor name, or None when its end is not one that a LoRA format writes."""
    if len(key) > MAX_NAME:
        return None
    for start in _START.finditer(key, 1):
        if match := _SUFFIX.fullmatch(key, start.start()):
            return key[: start.start()], str(match.lastgroup)
    return None


def split_module(module: str) -> tuple[str, str]:
    """`(component, alias)` of a module as written; a module without a known prefix is taken for the UNet's.

    The alias is what ResidentModules looks up: underscores for dots, `text_model_` and attention processors left out.
    """
    text = _WRAPPERS.sub("", module)
    component = UNET
    for prefix, owner in _PREFIXES:
        if text.startswith(prefix):
            text, component = text[len(prefix) :], owner
            break
    return component, alias_of(text)


def alias_of(name: str) -> str:
    """A module's name as ResidentModules looks it up: underscores, without what some trainers put in."""
    # `attn1.processor.to_q` is how diffusers wrote attention LoRAs before it used PEFT.
    return re.sub(r"^text_model_", "", name.replace(".", "_").replace("_processor_", "_"))


class ResidentModules:
    """The modules of a loaded SDXL that own a weight, found by any of the names trainers use for them."""

    def __init__(self, components: Mapping[str, Any]):
        """`components`: component name -> torch module; a torch.compile wrapper is looked through."""
        self.modules: dict[str, dict[str, Any]] = {}
        self._aliases: dict[str, dict[str, str]] = {}
        for component in COMPONENTS:
            root = components[component]
            root = getattr(root, "_orig_mod", root)
            owners = {
                name: module for name, module in root.named_modules() if getattr(module, "weight", None) is not None
            }
            self.modules[component] = owners
            self._aliases[component] = {alias: name for name in owners for alias in self._names(component, name)}

    def find(self, component: str, alias: str) -> str | None:
        """The name of the resident module, or None."""
        return self._aliases[component].get(alias)

    def in_sdxl(self, component: str, alias: str) -> bool:
        """True when SDXL base 1.0 has the module, whether this variant has it or not."""
        return self._sdxl.find(component, alias) is not None

    @cached_property
    def _sdxl(self) -> ResidentModules:
        # From its structure alone: meta tensors take no memory, but building them takes a second.
        from sdxl_worker import topology

        return ResidentModules(topology.structure(topology.FULL))

    @staticmethod
    def _names(component: str, name: str) -> Iterator[str]:
        alias = alias_of(name)
        yield alias
        if alias.endswith("_to_out_0"):
            yield alias.removesuffix("_0")
        if component == UNET and (original := original_name(name)) is not None:
            yield original.replace(".", "_")


_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER_PARTS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE_PARTS = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def original_name(name: str) -> str | None:
    """SDXL's own (CompVis / Stability) name of a diffusers UNet module, or None where it has none.

    Three levels of two resnets down and three up, as in SDXL; the numbering is that of
    diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint, read backwards.
    """
    if name in _OUTER_PARTS:
        return _OUTER_PARTS[name]
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)(?:\.(.+))?", name)
    if match is None:
        return None
    blocks, level, kind, index, rest = match.groups()
    if kind == "resnets" and rest:
        rest = _RESNET_PARTS.get(rest)
    if rest is None:
        return None
    if blocks == "mid_block":
        return f"middle_block.{_MIDDLE_PARTS[f'{kind}.{index}']}.{rest}"
    return _level_name(blocks, int(level), kind, int(index), rest)


def _level_name(blocks: str, level: int, kind: str, index: int, rest: str) -> str | None:
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op"
    if kind == "upsamplers":
        # The upsampler follows the attention of the level's last entry, or its resnet where there is no attention.
        return f"output_blocks.{3 * level + 2}.{2 if level < 2 else 1}.conv"
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if place is None:
        return None
    if blocks == "down_blocks":
        return f"input_blocks.{3 * level + index + 1}.{place}.{rest}"
    return f"output_blocks.{3 * level + index}.{place}.{rest}"
