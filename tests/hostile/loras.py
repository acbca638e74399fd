"""LoRA files that are broken, lie about themselves, or are made to cost time and memory."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from tests.hostile.case import Case, damaged, job, noise, words
from tests.hostile.drafts import DTYPES, Draft, Tensor, entry_of, wrong_header, zeros
from tests.support.http_server import whole
from tests.support.lora_files import FORMATS, kohya

ODD_DTYPES = ("F4", "C64", "f32", "", "F32\0", 3, None, ["F32"])
SHAPES: tuple[Any, ...] = (
    *([], [0], [1], [4], [16], [0, 0], [1, 1], [0, 32], [32, 0], [4, 32], [32, 4], [16, 4, 1, 1], [4, 16, 3, 3]),
    *([20_000, 1], [1, 20_000], [2**47, 2**47, 0], [1] * 8, [1] * 9, [1] * 65, [2**63], [-1, 4]),
    *([4.0, 4], ["4"], [True], None, 4, {}),
)
# Parts of a module whose product is far larger than they are: 0 stands for the large side.
CORES: tuple[dict[str, list[int]], ...] = (
    {"lora_up.weight": [16, 0], "lora_mid.weight": [0, 1, 3, 3], "lora_down.weight": [1, 0, 1, 1]},
    {"hada_w1_a": [0, 1], "hada_w1_b": [1, 0], "hada_w2_a": [0, 1], "hada_w2_b": [1, 0], "hada_t1": [1, 0, 1, 1]},
    {"lokr_w1": [0, 1], "lokr_w2": [1, 0], "lokr_t2": [1, 1, 3, 3]},
)
# {0} is the tensor's module, {1} the rest of its name.
NAMES = (
    *words("{0}_x.{1} {0}.x.{1} {0}.{1}.{1} lora_te1_{0}.{1} unet.{0}.{1} lora_unet_lora_unet_{0}.{1} {0}.lora_A"),
    *words("{0}.lora_up.weight.lora_down.weight lora_transformer_{1} diffusion_model.{1} bundle_emb.a.b . .. {1} {0}"),
    *("", "." * 50_000, "_" * 50_000, "x" * 1_000_000, "\ud800", "\0", "__metadata__", "../x"),
    *("lora_unet_" + "down_blocks_0_" * 5000 + ".alpha", "bundle_emb." + "c" * 5000 + ".string_to_param.*"),
)
PATTERNS = words("lora_unet_x{}.alpha {} lora_unet_down_blocks_{}_x.lora_up.weight a.{}.lora_A.weight")


def drafts(unet: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """One module of each format that the worker reads, in kohya's names."""
    made = {}
    for name, (module, make) in FORMATS.items():
        made[name] = kohya(module, make(unet.get_parameter(f"{module}.weight"))[0])
    return made


def _shape(random: Random, draft: Draft) -> str:
    name = random.choice(list(draft.tensors))
    tensor = draft.tensors[name]
    shape = tensor.shape if isinstance(tensor.shape, list) else [4]
    grown = [extent * random.choice((1, 2, 1000)) for extent in shape if isinstance(extent, int)]
    tensor.shape = random.choice((*SHAPES, shape[::-1], shape[1:], [1, *shape], [*shape, 1], grown))
    if random.random() < 0.8:
        tensor.data = zeros(tensor.shape, tensor.dtype)
    return f"shape of {name[-14:]} is {str(tensor.shape)[:30]}"


def _core(random: Random, draft: Draft) -> str:
    side, parts = random.choice((300, 3000, 20_000, 60_000)), random.choice(CORES)
    module = next(iter(draft.tensors)).partition(".")[0]
    draft.tensors = {}
    for name, pattern in parts.items():
        shape = [extent or side for extent in pattern]
        draft.tensors[f"{module}.{name}"] = Tensor("F16", shape, zeros(shape, "F16"))
    return f"core of {side}: {', '.join(parts)}"


def _dtype(random: Random, draft: Draft) -> str:
    name = random.choice(list(draft.tensors))
    tensor = draft.tensors[name]
    tensor.dtype = random.choice((*DTYPES, *ODD_DTYPES))
    if random.random() < 0.7:
        tensor.data = zeros(tensor.shape, tensor.dtype)
    return f"dtype {tensor.dtype!r}"


def _values(random: Random, draft: Draft) -> str:
    value = random.choice((math.nan, math.inf, -math.inf, 1e30, -3e38, 1e-42, 6e4))
    tensor = random.choice(list(draft.tensors.values()))
    tensor.data = struct.pack("<f", value) * (len(tensor.data) // 4)
    return f"values {value}"


def _alpha(random: Random, draft: Draft) -> str:
    module = next(iter(draft.tensors)).partition(".")[0]
    value = random.choice((0.0, -1.0, 1e30, math.nan, math.inf, 1e-40, 4.0))
    shape = random.choice(([], [1], [0], [1, 1], [4], [0, 5]))
    data = struct.pack("<f", value) * (0 if 0 in shape else math.prod(shape))
    draft.tensors[f"{module}.alpha"] = Tensor("F32", shape, data)
    if random.random() < 0.3:
        draft.tensors = {name: tensor for name, tensor in draft.tensors.items() if name.endswith("alpha")}
    return f"alpha {value} of shape {shape}, {len(draft.tensors)} tensors"


def _name(random: Random, draft: Draft) -> str:
    old = random.choice(list(draft.tensors))
    module, _, suffix = old.partition(".")
    new = random.choice(NAMES).replace("{0}", module).replace("{1}", suffix)
    draft.tensors[new] = draft.tensors.pop(old)
    return f"name {new[:40]!r}"


def _dropped(random: Random, draft: Draft) -> str:
    name = random.choice(list(draft.tensors))
    del draft.tensors[name]
    return f"without {name.partition('.')[2]}"


def _twice(random: Random, draft: Draft) -> str:
    """One module under two namings, with equal or other contents."""
    module = next(iter(draft.tensors)).partition(".")[0]
    dotted = "unet." + module.removeprefix("lora_unet_")
    extra = {name.replace(module, dotted): tensor for name, tensor in draft.tensors.items()}
    draft.tensors |= extra
    return "twice"


def _many(random: Random, draft: Draft) -> str:
    number = random.choice((100, 3000, 12_000, 40_000))
    pattern = random.choice(PATTERNS)
    draft.tensors |= {pattern.format(index): Tensor("F32", [1], bytes(4)) for index in range(number)}
    return f"{number} tensors {pattern}"


def _metadata(random: Random, draft: Draft) -> str:
    deep = "[" * 50_000 + "]" * 50_000
    pattern = {f"m{index}": index for index in range(random.choice((3, 20_000)))}
    peft = random.choice(
        (
            {"unet.lora_alpha": 1e308, "unet.r": 10**9, "unet.use_rslora": True},
            {"lora_alpha": "x", "alpha_pattern": pattern, "kasa_config": {}, "modules_to_save": ["conv_in"]},
            {"unet.alpha_pattern": {**pattern, ".*": 5, "(a+)+$": 7, "^": math.nan}},
            {"unet.rank_pattern": pattern, "unet.lora_alpha": -0.0},
        )
    )
    metadata = random.choice(
        (
            {"lora_adapter_metadata": json.dumps(peft)},
            {"lora_adapter_metadata": deep},
            {"ss_tag_frequency": deep, "ss_dataset_dirs": deep},
            {"ss_tag_frequency": json.dumps({"d": {f"tag {index}": 2**70 for index in range(20_000)}})},
            {"ss_base_model_version": random.choice(("sd_v1", "\ud800", "x" * 10**6, "sdxl_base_v1-0\x1b[31m"))},
            {"ss_network_module": "networks." + "lora" * 10_000, "ss_network_args": deep},
            {"modelspec.title": "\u202e\0" * 5000, "modelspec.trigger_phrase": "a," * 10_000},
            {"k": 3}, {"k": None}, {"k": ["x"]}, {"": ""},
            {f"k{index}": "v" for index in range(30_000)},
        )
    )  # fmt: skip
    draft.metadata = metadata
    return f"metadata {ascii(metadata)[:60]}"


_CHANGES: tuple[tuple[int, Callable[[Random, Draft], str]], ...] = (
    (6, _shape),
    (2, _core),
    (3, _dtype),
    (2, _values),
    (3, _alpha),
    (4, _name),
    (2, _dropped),
    (1, _twice),
    (1, _many),
    (3, _metadata),
)


class Loras:
    """The generator; `unet` gives the shapes of files that fit, `pickles` is how often a file is a pickle."""

    def __init__(self, unet: torch.nn.Module, pickles: float = 0.02) -> None:
        self._bases = drafts(unet)
        self._pickles = pickles

    def make(self, random: Random, host: str) -> Case:
        """One file, by URL or put into the cache folder by hand, applied at some scale."""
        base = random.choice(list(self._bases))
        what, content, suffix = self._file(random, base)
        scale = random.choice((1, 1, 1, -1, 0, 100, 0.001, {"unet": 0.5}))
        if suffix == ".safetensors" and random.random() < 0.3:
            name = f"hostile-{random.randrange(2**32):08x}{suffix}"
            entry = {"path": name, "scale": scale}
            return Case(f"{base} by hand: {what}", job(loras=[entry]), by_hand={name: content})
        path = f"/{random.randrange(2**32):08x}{suffix}"
        entries = [{"path": host + path, "scale": scale}] * random.choice((1, 1, 2))
        return Case(f"{base}{suffix}: {what}", job(loras=entries), {path: [whole(content)]})

    def _file(self, random: Random, base: str) -> tuple[str, bytes, str]:
        tensors = self._bases[base]
        if random.random() < self._pickles:
            return "pickle", *_pickle(random, tensors)
        draft = Draft({name: entry_of(tensor) for name, tensor in tensors.items()})
        said = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            (change,) = random.choices([change for _, change in _CHANGES], [weight for weight, _ in _CHANGES])
            if draft.tensors:
                said.append(change(random, draft))
        what = "; ".join(said)
        kind = random.random()
        if kind < 0.15 and draft.tensors:
            return f"header, {what}", wrong_header(random, draft), ".safetensors"
        content = draft.write()
        if kind < 0.3:
            how, content = damaged(random, content)
            what = f"{how}, {what}"
        return what, content, ".safetensors"


def _pickle(random: Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    content = random.choice(
        (
            dict(tensors),
            {"state_dict": dict(tensors), "epoch": 3},
            {"a": torch.zeros(1).expand(200_000_000)},
            {3: tensors},
            [1, 2],
            dict.fromkeys(tensors, "x"),
            torch.nn.Linear(2, 2),
            {"a": torch.eye(3).to_sparse(), "b": torch.zeros(2, dtype=torch.complex64)},
        )
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    if random.random() < 0.3:
        data = damaged(random, data)[1]
    if random.random() < 0.1:
        data = noise(random, 500)
    return data, random.choice((".pt", ".bin"))
