"""A random SDXL with the real structure, at any size, built in memory: nothing is downloaded.

`MODEL_ID=tiny` serves it, the tests render with it and the benchmarks build its larger sizes. The block layout is
SDXL's own (Down, CrossAttnDown, CrossAttnDown; two text encoders; text_time conditioning; an 8x VAE), so that LoRA
key names mean the same modules; only widths and depths change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

EXAMPLE_LORA = "tiny-example.safetensors"


@dataclass(frozen=True)
class SdxlSize:
    """Widths and depths of one SDXL; `heads` are attention heads per UNet level, `text*` are (width, layers, heads)."""

    unet_channels: tuple[int, int, int]
    transformer_layers: tuple[int, int, int]
    heads: tuple[int, int, int]
    text: tuple[int, int, int]
    text_2: tuple[int, int, int]
    projection_dim: int
    time_embed_dim: int
    vae_channels: tuple[int, int, int, int]
    vocabulary: int
    norm_groups: int
    sample_size: int


TINY = SdxlSize((16, 32, 32), (1, 1, 2), (2, 4, 4), (16, 2, 2), (24, 2, 2), 24, 8, (8, 8, 16, 16), 768, 4, 32)
# 722 LoRA-able UNet linears and the real text encoder depths, at about 1/8 of the width.
NARROW = SdxlSize(
    (40, 80, 160), (1, 2, 10), (1, 2, 4), (96, 12, 2), (160, 32, 4), 160, 32, (16, 32, 64, 64), 2048, 8, 32
)
# stabilityai/stable-diffusion-xl-base-1.0
FULL = SdxlSize(
    (320, 640, 1280),
    (1, 2, 10),
    (5, 10, 20),
    (768, 12, 12),
    (1280, 32, 20),
    1280,
    256,
    (128, 256, 512, 512),
    49408,
    32,
    128,
)

# The most frequent pairs of letters in English text.
_LETTER_PAIRS = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea
ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot il tr ly nc et ut ss so rs un lo wa ge ie
wh ee wi em ad ol rt po we na ul ni ts mo ow pa im mi ai sh ir su id os iv ia am fi ci vi pl ig tu ev ld ry mp fe bl ab
gh ke ap au
"""

# scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0.
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def build_sdxl(
    size: SdxlSize = TINY,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    in_channels: int = 4,
) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline with random weights, the same bits for the same arguments; global RNG untouched.

    `in_channels` are the UNet's: 9 for an inpainting checkpoint.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        with default_dtype(dtype), torch.device(device):
            unet, vae = _unet(size, in_channels), _vae(size)
            text_encoder = CLIPTextModel(_text_config(size, size.text, "quick_gelu"))
            text_encoder_2 = CLIPTextModelWithProjection(_text_config(size, size.text_2, "gelu"))
    tokenizer, tokenizer_2 = tokenizers()
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG),
        add_watermarker=False,
    )
    return pipeline.to(device)


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of both text encoders; they differ in their padding, as SDXL's do."""
    return _tokenizer("<|endoftext|>"), _tokenizer("!")


def structure(size: SdxlSize) -> dict[str, torch.nn.Module]:
    """UNet and text encoders of the given size by component name, on the meta device: names and shapes, no memory."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        return {
            "unet": _unet(size),
            "text_encoder": CLIPTextModel(_text_config(size, size.text, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(size, size.text_2, "gelu")),
        }


def write_example_lora(folder: Path) -> Path:
    """Put a LoRA that fits the TINY size into `folder` (created if missing) once, and return its path.

    kohya key names, rank 4, alpha 4, every attention projection of the UNet; values are fixed by a seed. The file
    appears whole or not at all.
    """
    from safetensors.torch import save_file

    target = folder / EXAMPLE_LORA
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{EXAMPLE_LORA}.{torch.randint(2**62, ()).item():x}.part"
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_output_name": "tiny example", "ss_network_dim": "4"}
    save_file(_example_tensors(), str(unfinished), metadata)
    unfinished.replace(target)
    return target


def _example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in structure(TINY)["unet"].named_modules():
        if ".attn" in name and isinstance(module, torch.nn.Linear):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.3
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.3
            tensors[f"{key}.alpha"] = torch.tensor(4.0)
    return tensors


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors are of `dtype` where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unet(size: SdxlSize, in_channels: int = 4):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size.sample_size,
        in_channels=in_channels,
        block_out_channels=size.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=list(size.transformer_layers),
        attention_head_dim=list(size.heads),
        cross_attention_dim=size.text[0] + size.text_2[0],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_embed_dim,
        projection_class_embeddings_input_dim=6 * size.time_embed_dim + size.projection_dim,
        norm_num_groups=size.norm_groups,
    )


def _vae(size: SdxlSize):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=size.norm_groups,
        scaling_factor=0.13025,
        sample_size=8 * size.sample_size,
    )


def _text_config(size: SdxlSize, shape: tuple[int, int, int], activation: str) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    width, layers, heads = shape
    return CLIPTextConfig(
        vocab_size=size.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=size.projection_dim,
        hidden_act=activation,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer: 256 bytes, 256 bytes that end a word, start and end of text, and pairs of letters.

    The pairs make English about half as long, so that an ordinary prompt fits into CLIP's 75 tokens.
    """
    from transformers import CLIPTokenizer

    alphabet = _byte_characters()
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    merges = [(pair[0], pair[1] + end) for pair in _LETTER_PAIRS.split() for end in ("", "</w>")]
    tokens += [first + second for first, second in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _byte_characters() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as, in GPT-2's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index, _ in enumerate(others)]
