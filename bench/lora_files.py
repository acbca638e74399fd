"""LoRA files for measurements: of any rank and format, on all or some of the layers that trainers target by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA, SCALE = 32, 16.0, 0.7
# LyCORIS' defaults and what its users take: the smaller part of LoKr, the blocks of OFT.
KRONECKER_SIDE = BLOCK_SIDE = 8

Random = Callable[..., Tensor]


def linear_layers(pipeline: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """kohya key and layer of every linear layer that LoRA trainers target by default."""
    for prefix, root in (
        ("lora_unet", pipeline.unet),
        ("lora_te1", pipeline.text_encoder),
        ("lora_te2", pipeline.text_encoder_2),
    ):
        for name, module in root.named_modules():
            is_target = any(part in name for part in (".attn", ".ff.", "proj_in", "proj_out", ".self_attn.", ".mlp."))
            if isinstance(module, torch.nn.Linear) and is_target:
                path = name if prefix == "lora_unet" else f"text_model.{name.removeprefix('text_model.')}"
                yield f"{prefix}_{path.replace('.', '_')}", module


def write_loras(pipeline: Any, folder: Path, count: int) -> list[Path]:
    """`count` LoRA files in float16 with kohya keys, small enough in effect for float16 to stay finite."""
    return [write_file(pipeline, folder / f"lora{index}.safetensors", seed=index) for index in range(count)]


def write_file(
    pipeline: Any, path: Path, *, name: str = "LoRA", rank: int = RANK, share: float = 1.0, seed: int = 0
) -> Path:
    """One file of the format `name` in float16, on `share` of the layers, evenly spread over the model; its path."""
    layers = list(linear_layers(pipeline))
    wanted = max(1, round(share * len(layers)))
    chosen = [layers[index * len(layers) // wanted] for index in range(wanted)]
    device = chosen[0][1].weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tensors: dict[str, Tensor] = {}
    for key, layer in chosen:
        made = WRITERS[name](layer.weight.detach(), rank, random)
        tensors |= {f"{key}.{suffix}": tensor.half().contiguous().cpu() for suffix, tensor in made.items()}
    save_file(tensors, str(path))
    return path


def _lora(weight: Tensor, rank: int, random: Random) -> dict[str, Tensor]:
    out, inner = weight.shape
    down, up = random(rank, inner) / inner**0.5, random(out, rank) * 0.02
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}


def _loha(weight: Tensor, rank: int, random: Random) -> dict[str, Tensor]:
    out, inner = weight.shape
    # As many numbers as a LoRA of the full rank.
    half = max(1, rank // 2)
    pairs = {f"hada_w{part}_a": random(out, half) * 0.1 for part in (1, 2)}
    pairs |= {f"hada_w{part}_b": random(half, inner) * 0.1 for part in (1, 2)}
    return {**pairs, "alpha": torch.tensor(half / 2)}


def _lokr(weight: Tensor, _rank: int, random: Random) -> dict[str, Tensor]:
    out, inner = weight.shape
    side = KRONECKER_SIDE
    return {"lokr_w1": random(side, side) * 0.1, "lokr_w2": random(out // side, inner // side) * 0.02}


def _dora(weight: Tensor, rank: int, random: Random) -> dict[str, Tensor]:
    magnitude = 1.01 * weight.float().norm(dim=1, keepdim=True)
    return {**_lora(weight, rank, random), "dora_scale": magnitude}


def _oft(weight: Tensor, _rank: int, random: Random) -> dict[str, Tensor]:
    blocks = random(weight.shape[0] // BLOCK_SIDE, BLOCK_SIDE, BLOCK_SIDE) * 0.01
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}


WRITERS: dict[str, Callable[[Tensor, int, Random], dict[str, Tensor]]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "DoRA": _dora,
    "OFT": _oft,
}
