"""Write a diffusers SDXL pipeline as the single file that Stability, A1111 and Civitai use."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdxl_worker.lora.keys import original_name

# Applied in this order to each VAE and OpenCLIP tensor name.
_VAE_NAMES = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{3 - int(match[1])}.block"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_OPEN_CLIP_NAMES = (
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
)


def save_single_file(pipeline, path: Path, marks: Collection[str] = (), metadata: dict[str, str] | None = None) -> Path:
    """All weights of `pipeline` in one .safetensors file under SDXL's original names.

    `marks` are the names of empty tensors beside them, such as ComfyUI's `v_pred`.
    """
    tensors: dict[str, torch.Tensor] = {name: torch.tensor([]) for name in marks}
    for name, value in pipeline.unet.state_dict().items():
        module, _, parameter = name.rpartition(".")
        tensors[f"model.diffusion_model.{original_name(module)}.{parameter}"] = value
    for name, value in pipeline.vae.state_dict().items():
        is_attention = ".attentions." in name and value.ndim == 2
        tensors[f"first_stage_model.{_renamed(name, _VAE_NAMES)}"] = value[:, :, None, None] if is_attention else value
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name}"] = value
    for name, value in _open_clip(pipeline.text_encoder_2.state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{name}"] = value
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, str(path), metadata)
    return path


def save_configs(pipeline, folder: Path) -> None:
    """What a single file lacks: the configs and tokenizers of `pipeline`, without weights."""
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in state.items():
        if match := re.search(r"(.*self_attn\.)q_proj\.(weight|bias)", name):
            # OpenCLIP keeps the three projections in one tensor.
            joined = torch.cat([state[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"])
            tensors[_renamed(f"{match[1]}in_proj_{match[2]}", _OPEN_CLIP_NAMES)] = joined
        elif not re.search(r"[kv]_proj\.(weight|bias)$", name):
            new = _renamed(name, _OPEN_CLIP_NAMES)
            tensors[new] = value.T if new == "text_projection" else value
    return tensors


def _renamed(name: str, table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
