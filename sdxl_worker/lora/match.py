"""Match a LoRA file to the modules of the resident model, before a weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdxl_worker.errors import LoraIncompatible
from sdxl_worker.lora.base_models import SDXL, UNKNOWN
from sdxl_worker.lora.file import LoraContent
from sdxl_worker.lora.formats import Change, build_changes, map_tensors
from sdxl_worker.lora.keys import TEXT_ENCODER, ResidentModules, split_module
from sdxl_worker.lora.merge import Target
from sdxl_worker.text import clean_text


@dataclass(frozen=True)
class Place:
    """Where one module of the file goes: its tensor names by role, and the resident module they change."""

    written: str
    roles: dict[str, str]
    component: str
    module: str
    alpha: float | None


@dataclass(frozen=True)
class Matched:
    """A file matched to the resident model: the change of each parameter, on the host, and what to tell the caller."""

    changes: dict[Target, Change] = field(repr=False)
    warnings: tuple[str, ...] = ()


def match_lora(content: LoraContent, resident: ResidentModules) -> Matched:
    """Find each module of the file in the resident model and try its formula on shapes alone.

    Raises LoraIncompatible: another base model, by name; "n of m modules match"; a misfitting shape, with the tensor.
    Modules that SDXL has but the resident variant lacks are left out with a warning, as are bundled embeddings.
    """
    base_model = content.facts.base_model
    if base_model not in (SDXL, UNKNOWN):
        raise LoraIncompatible(f"this LoRA is for {base_model}; this worker runs SDXL")
    places, missing = _find_places(content, resident)
    _check_matches(content, places, missing)
    if base_model == UNKNOWN and all(place.component == TEXT_ENCODER for place in places):
        raise LoraIncompatible(
            "this LoRA changes only the text encoder that Stable Diffusion 1.5 and SDXL share, and nothing in it says "
            "that it was made for SDXL"
        )
    changes = _build(places, content.tensors)
    _check_shapes(places, changes, resident)
    warnings = []
    if missing:
        warnings.append(f"{len(missing)} of {len(content.keys.modules)} modules are not in this variant of SDXL")
    if content.keys.embeddings:
        names = ", ".join(clean_text(name) for name in content.keys.embeddings[:10])
        warnings.append(f"bundled embeddings are not applied: {names}")
    return Matched(changes, tuple(warnings))


def _find_places(content: LoraContent, resident: ResidentModules) -> tuple[list[Place], list[str]]:
    places, missing = [], []
    for written, roles in content.keys.modules.items():
        component, alias = split_module(written)
        module = resident.find(component, alias)
        if module is None:
            missing.append(written)
        else:
            alpha = _peft_alpha(content, component, module, roles)
            places.append(Place(written, roles, component, module, alpha))
    return places, missing


def _peft_alpha(content: LoraContent, component: str, module: str, roles: Mapping[str, str]) -> float | None:
    """The module's alpha by PEFT's metadata (times sqrt(rank) where LoRA is rank-stabilised); None without one."""
    peft: dict[str, Any] = content.peft
    prefix = f"{component}." if f"{component}.alpha" in peft else ""
    pattern: dict[str, float] = peft.get(f"{prefix}pattern", {})
    alpha = next((value for name, value in pattern.items() if module.endswith(name)), peft.get(f"{prefix}alpha"))
    if alpha is None or "down" not in roles or "alpha" in roles:
        return None
    rank = content.header.shapes[roles["down"]][0]
    return alpha * rank**0.5 if peft.get(f"{prefix}rslora") else alpha


def _check_matches(content: LoraContent, places: list[Place], missing: list[str]) -> None:
    total = len(content.keys.modules)
    foreign = [written for written in missing if not _is_sdxl_module(written)]
    if content.keys.unknown:
        raise LoraIncompatible(
            f"{len(content.keys.unknown)} of {content.facts.tensors} tensors have names this worker does not know, "
            f"such as {_quoted(content.keys.unknown[0])}"
        )
    if foreign or not places:
        example = (foreign or missing)[0]
        raise LoraIncompatible(
            f"only {len(places)} of {total} modules match SDXL; {_quoted(example)} does not: the LoRA is for another "
            "base model or damaged"
        )


def _is_sdxl_module(written: str) -> bool:
    component, alias = split_module(written)
    return _sdxl_modules().find(component, alias) is not None


@cache
def _sdxl_modules() -> ResidentModules:
    """The module names of SDXL base 1.0, from its structure alone (meta tensors, no memory)."""
    from sdxl_worker import topology

    return ResidentModules(topology.structure(topology.FULL))


def _build(places: list[Place], tensors: Mapping[str, Tensor]) -> dict[Target, Change]:
    changes: dict[Target, Change] = {}
    for place in places:
        roles = {role: tensors[name] for role, name in place.roles.items()}
        for parameter, change in build_changes(place.written, roles, place.alpha).items():
            changes[Target(place.component, place.module, parameter)] = change
    return changes


def _check_shapes(places: list[Place], changes: Mapping[Target, Change], resident: ResidentModules) -> None:
    written = {(place.component, place.module): place.written for place in places}
    # A file has about a thousand modules of some thirty kinds: one trial for each kind.
    fitting: set[Any] = set()
    for target, change in changes.items():
        weight = getattr(resident.modules[target.component][target.module], target.parameter, None)
        name = _quoted(written[target.component, target.module])
        if weight is None:
            raise LoraIncompatible(f"{name} changes a {target.parameter} that the module does not have")
        kind = (weight.shape, _shapes(change))
        if kind in fitting:
            continue
        try:
            # On the meta device a formula checks its shapes and computes nothing.
            map_tensors(change, _to_meta).change(torch.empty(weight.shape, device="meta"))
            fitting.add(kind)
        except (RuntimeError, IndexError, ValueError) as error:
            raise LoraIncompatible(
                f"the tensors of {name} do not fit the resident {target.parameter} of shape {tuple(weight.shape)}"
            ) from error


def _shapes(value: Any) -> Any:
    """A change's formula and the shapes of its tensors, as a hashable value."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, tuple):
        return tuple(_shapes(part) for part in value)
    if is_dataclass(value):
        return type(value), *(_shapes(getattr(value, item.name)) for item in fields(value))
    return value is None


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _quoted(name: str) -> str:
    return repr(clean_text(name))
