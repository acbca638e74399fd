"""Match a LoRA file to the modules of the resident model, before a weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sdxl_worker.errors import LoraIncompatible
from sdxl_worker.lora.base_models import SDXL, UNKNOWN
from sdxl_worker.lora.file import LoraContent, made_for
from sdxl_worker.lora.formats import rank_of
from sdxl_worker.lora.formats.format import Change
from sdxl_worker.lora.keys import TEXT_ENCODER, ResidentModules, alias_of, split_module
from sdxl_worker.lora.merge import Target
from sdxl_worker.lora.peft import PeftScaling, peft_scaling
from sdxl_worker.lora.trial import Trial, quoted


@dataclass(frozen=True)
class Place:
    """Where one module of the file goes: its name as written, and the resident module it changes."""

    written: str
    component: str
    module: str


@dataclass(frozen=True)
class Matched:
    """A file matched to the resident model: the change of each parameter, on the host, and what to tell the caller."""

    changes: dict[Target, Change] = field(repr=False)
    warnings: tuple[str, ...] = ()


def match_lora(content: LoraContent, resident: ResidentModules) -> Matched:
    """Find each module of the file in the resident model and try its formula on shapes alone.

    Raises LoraIncompatible: another base model, by name; "n of m modules match"; a misfitting shape, with the tensor.
    Modules that SDXL has but the resident variant lacks are left out with a warning.
    """
    base_model = content.facts.base_model
    if base_model not in (SDXL, UNKNOWN):
        raise made_for(base_model)
    places, missing = _find_places(content, resident)
    _check_matches(content, places, missing, resident)
    if base_model == UNKNOWN and all(place.component == TEXT_ENCODER for place in places):
        raise LoraIncompatible(
            "this LoRA changes only the text encoder that Stable Diffusion 1.5 and SDXL share, and nothing in it says "
            "that it was made for SDXL"
        )
    changes = _build(places, content, resident)
    warnings = []
    if missing:
        warnings.append(f"{len(missing)} of {len(content.keys.modules)} modules are not in this variant of SDXL")
    return Matched(changes, tuple(warnings))


def _find_places(content: LoraContent, resident: ResidentModules) -> tuple[list[Place], list[str]]:
    places: dict[tuple[str, str], Place] = {}
    missing = []
    for written in content.keys.modules:
        component, alias = split_module(written)
        module = resident.find(component, alias)
        if module is None:
            missing.append(written)
            continue
        place = places.setdefault((component, module), Place(written, component, module))
        if place.written != written:
            # Whether the two add up or are one change said twice, nothing in the file tells.
            raise LoraIncompatible(
                f"the file changes one module under two names, {quoted(place.written)} and {quoted(written)}"
            )
    return list(places.values()), missing


def _check_matches(content: LoraContent, places: list[Place], missing: list[str], resident: ResidentModules) -> None:
    total = len(content.keys.modules)
    foreign = [written for written in missing if not resident.in_sdxl(*split_module(written))]
    if content.keys.unknown:
        raise LoraIncompatible(
            f"{len(content.keys.unknown)} of {content.facts.tensors} tensors have names this worker does not know, "
            f"such as {quoted(content.keys.unknown[0])}"
        )
    if foreign or not places:
        example = (foreign or missing)[0]
        raise LoraIncompatible(
            f"only {len(places)} of {total} modules match SDXL; {quoted(example)} does not: the LoRA is for another "
            "base model or damaged"
        )


def _build(places: Sequence[Place], content: LoraContent, resident: ResidentModules) -> dict[Target, Change]:
    scalings, trial = peft_scaling(content.header.metadata), Trial()
    changes: dict[Target, Change] = {}
    for place in places:
        tensors = {role: content.tensors[name] for role, name in content.keys.modules[place.written].items()}
        scaling = scalings.get(place.component) or scalings.get("", PeftScaling())
        rank = rank_of({role: tensor.shape for role, tensor in tensors.items()}) if "down" in tensors else None
        alpha = scaling.alpha_of(alias_of(place.module), rank) if rank else None
        owner = resident.modules[place.component][place.module]
        for parameter, change in trial.changes(place.written, tensors, alpha, owner).items():
            changes[Target(place.component, place.module, parameter)] = change
    return changes
