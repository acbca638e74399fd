"""LoRA files as trainers write them, with the change each should make, computed here and not by the worker.

Every function in FORMATS returns one module's tensors by suffix and the expected change of its weight at scale 1, in
float64, straight from the published formula.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "mid_block.attentions.0.transformer_blocks.0.norm1"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values times 0.3, float32, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def _d(tensor: Tensor) -> Tensor:
    return tensor.double()


def lora(weight: Tensor, rank: int = 4, alpha: float = 2.0, seed: int = 0) -> tuple[Tensors, Tensor]:
    """LoRA and LoCon, Hu et al. 2021: alpha / rank * up @ down."""
    out, rest = weight.shape[0], weight.shape[1:]
    up, down = randn(out, rank, *[1] * (len(rest) - 1), seed=seed), randn(rank, *rest, seed=seed + 1)
    change = alpha / rank * (_d(up).flatten(1) @ _d(down).flatten(1)).reshape(weight.shape)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}, change


def locon_tucker(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """LoCon with a Tucker core: alpha / rank * core x_out up x_in down (LyCORIS, Yeh et al. 2023)."""
    out, inp, *kernel = weight.shape
    up, core, down = randn(out, rank, 1, 1), randn(rank, rank, *kernel), randn(rank, inp, 1, 1)
    change = torch.einsum("mnhw,om,ni->oihw", _d(core), _d(up)[:, :, 0, 0], _d(down)[:, :, 0, 0])
    tensors = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * change


def loha(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """LoHa, Yeh et al. 2023: alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)."""
    out, columns = weight.shape[0], weight[0].numel()
    parts = [
        randn(out, rank, seed=1),
        randn(rank, columns, seed=2),
        randn(out, rank, seed=3),
        randn(rank, columns, seed=4),
    ]
    change = alpha / rank * (_d(parts[0]) @ _d(parts[1])) * (_d(parts[2]) @ _d(parts[3]))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {**dict(zip(names, parts, strict=True)), "alpha": torch.tensor(alpha)}, change.reshape(weight.shape)


def loha_tucker(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """LoHa on convolutions with Tucker cores t1 and t2."""
    out, inp, *kernel = weight.shape
    tensors = {"alpha": torch.tensor(alpha)}
    change = torch.full((), alpha / rank, dtype=torch.float64)
    for half in (1, 2):
        core, a, b = (
            randn(rank, rank, *kernel, seed=half),
            randn(rank, out, seed=half + 2),
            randn(rank, inp, seed=half + 4),
        )
        tensors |= {f"hada_t{half}": core, f"hada_w{half}_a": a, f"hada_w{half}_b": b}
        change = change * torch.einsum("ijhw,jr,ip->prhw", _d(core), _d(b), _d(a))
    return tensors, change


def lokr(weight: Tensor) -> tuple[Tensors, Tensor]:
    """LoKr with both parts whole: kron(w1, w2); the alpha that trainers write has no meaning then."""
    out, inp, *kernel = weight.shape
    w1, w2 = randn(4, 2), randn(out // 4, inp // 2, *kernel)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e4)}, _kron(_d(w1), _d(w2))


def lokr_decomposed(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """LoKr with w1 = w1_a @ w1_b and w2 = w2_a @ w2_b, scaled by alpha / rank."""
    out, inp, *kernel = weight.shape
    w1_a, w1_b = randn(4, rank), randn(rank, 2)
    w2_a, w2_b = randn(out // 4, rank), randn(rank, inp // 2, *kernel)
    w2 = (_d(w2_a) @ _d(w2_b).flatten(1)).reshape(out // 4, inp // 2, *kernel)
    tensors = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * _kron(_d(w1_a) @ _d(w1_b), w2)


def lokr_tucker(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """LoKr on convolutions with w1 whole and w2 through a Tucker core t2."""
    out, inp, *kernel = weight.shape
    w1, core = randn(4, 2), randn(rank, rank, *kernel)
    w2_a, w2_b = randn(rank, out // 4, seed=1), randn(rank, inp // 2, seed=2)
    w2 = torch.einsum("ijhw,ip,jr->prhw", _d(core), _d(w2_a), _d(w2_b))
    tensors = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * _kron(_d(w1), w2)


def _kron(w1: Tensor, w2: Tensor) -> Tensor:
    kernel = w2.shape[2:]
    wide = w1.reshape(*w1.shape, *[1] * len(kernel))
    return torch.from_numpy(np.kron(wide.numpy(), w2.numpy()))


def dora(weight: Tensor) -> tuple[Tensors, Tensor]:
    """DoRA, Liu et al. 2024, equation 5, with one magnitude per output row."""
    tensors, change = lora(weight)
    merged = _d(weight) + change
    shape = (-1, *[1] * (weight.ndim - 1))
    magnitude = 1.0 + randn(weight.shape[0]).abs().reshape(shape)
    norm = merged.flatten(1).norm(dim=1).reshape(shape)
    return {**tensors, "dora_scale": magnitude}, _d(magnitude) * merged / norm - _d(weight)


def dora_by_column(weight: Tensor) -> tuple[Tensors, Tensor]:
    """The orientation that LyCORIS wrote first: one magnitude per input column."""
    tensors, change = lora(weight)
    merged = _d(weight) + change
    magnitude = 1.0 + randn(1, weight.shape[1]).abs()
    return {**tensors, "dora_scale": magnitude}, _d(magnitude) * merged / merged.norm(dim=0, keepdim=True) - _d(weight)


def difference(weight: Tensor) -> tuple[Tensors, Tensor]:
    """A full difference, as LyCORIS' `full` writes it."""
    change = randn(*weight.shape)
    return {"diff": change}, _d(change)


def norm_difference(weight: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS' norm training."""
    change = randn(*weight.shape)
    return {"w_norm": change}, _d(change)


def oft(weight: Tensor, constraint: float = 0.01) -> tuple[Tensors, Tensor]:
    """Diag-OFT, Qiu et al. 2023, as LyCORIS writes it: block rotations of the output rows, bounded, with a rescale."""
    out, size = weight.shape[0], 4
    blocks, rescale = randn(out // size, size, size), 1.0 + randn(out, *[1] * (weight.ndim - 1))
    rotation = _cayley(_d(blocks), constraint * out)
    rows = _d(weight).flatten(1)
    turned = torch.block_diag(*rotation.transpose(1, 2)) @ rows
    change = (_d(rescale).flatten()[:, None] * turned - rows).reshape(weight.shape)
    return {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(constraint)}, change


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    if limit and skew.norm() > limit:
        skew = skew * limit / skew.norm()
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (identity + skew) @ (identity - skew).inverse()


def boft(weight: Tensor) -> tuple[Tensors, Tensor]:
    """BOFT, Liu et al. 2023, through LyCORIS' own function."""
    from lycoris.functional.boft import diff_weight

    blocks = randn(2, weight.shape[0] // 4, 4, 4)
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, _d(diff_weight(weight, blocks, None, constraint=0))


def glora(weight: Tensor, rank: int = 3, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """GLoRA, Chavan et al. 2023: alpha / rank * (W @ a1 @ a2 + b1 @ b2)."""
    out, inp = weight.shape
    a1, a2, b1, b2 = (
        randn(inp, rank, seed=1),
        randn(rank, inp, seed=2),
        randn(out, rank, seed=3),
        randn(rank, inp, seed=4),
    )
    change = alpha / rank * (_d(weight) @ _d(a1) @ _d(a2) + _d(b1) @ _d(b2))
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    return {**dict(zip(names, (a1, a2, b1, b2), strict=True)), "alpha": torch.tensor(alpha)}, change


# Test id -> (a module of the kind it is for, format). Each is one cell of the README's table of formats.
FORMATS: dict[str, tuple[str, Callable[[Tensor], tuple[Tensors, Tensor]]]] = {
    "LoRA": (LINEAR, lora),
    "LoCon": (CONV, lora),
    "LoCon Tucker": (CONV, locon_tucker),
    "LoHa": (LINEAR, loha),
    "LoHa convolution": (CONV, loha),
    "LoHa Tucker": (CONV, loha_tucker),
    "LoKr": (LINEAR, lokr),
    "LoKr convolution": (CONV, lokr),
    "LoKr decomposed": (LINEAR, lokr_decomposed),
    "LoKr decomposed convolution": (CONV, lokr_decomposed),
    "LoKr Tucker": (CONV, lokr_tucker),
    "DoRA": (LINEAR, dora),
    "DoRA convolution": (CONV, dora),
    "DoRA by column": (CROSS, dora_by_column),
    "full difference": (CONV, difference),
    "norm difference": (NORM, norm_difference),
    "OFT": (LINEAR, oft),
    "OFT convolution": (CONV, oft),
    "BOFT": (LINEAR, boft),
    "GLoRA": (LINEAR, glora),
}


def modules_for(unet: torch.nn.Module, module: str) -> list[str]:
    """The modules of the same kind as `module` (all attention projections, all first convolutions, all such norms)."""
    end = {LINEAR: ("to_q", "to_k", "to_v", "to_out.0"), CROSS: ("attn2.to_k", "attn2.to_v"), CONV: ("conv1", "conv2")}
    return [name for name, _ in unet.named_modules() if name.endswith(end.get(module, ("norm1", "norm2", "norm")))]


def whole_unet(unet: torch.nn.Module, name: str) -> tuple[Tensors, dict[str, Tensor]]:
    """A kohya file of format `name` for every fitting UNet module, and the expected change of each module's weight."""
    module, make = FORMATS[name]
    tensors: Tensors = {}
    changes = {}
    for target in modules_for(unet, module):
        part, changes[target] = make(unet.get_parameter(f"{target}.weight").cpu())
        tensors |= kohya(target, part)
    return tensors, changes


def kohya(module: str, tensors: Tensors, prefix: str = "lora_unet_") -> Tensors:
    """kohya's key names: underscores for dots in the module, then the suffix."""
    return {f"{prefix}{module.replace('.', '_')}.{suffix}": tensor for suffix, tensor in tensors.items()}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, str(path), metadata)
    return path


def weight_hash(pipeline) -> str:
    """A hash over every weight, its dtype and requires_grad flag, the module types and the scheduler's config.

    A refiner has one text encoder less.
    """
    digest = hashlib.sha256(repr((type(pipeline.scheduler), sorted(pipeline.scheduler.config.items()))).encode())
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        if (root := getattr(pipeline, component)) is None:
            continue
        digest.update(repr([(name, type(module)) for name, module in root.named_modules()]).encode())
        for name, value in [*root.named_parameters(), *root.named_buffers()]:
            digest.update(f"{component}.{name} {value.dtype} {value.requires_grad}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def picture(pipeline, seed: int = 3) -> np.ndarray:
    """A 64 x 64 picture by plain diffusers, two steps, as int16 so that differences do not wrap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        image = pipeline("a lighthouse", width=64, height=64, num_inference_steps=2, generator=generator).images[0]
    return np.asarray(image).astype(np.int16)
