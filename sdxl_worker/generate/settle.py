"""The settings that a request leaves out, taken from its few-step LoRA where it has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.few_step import NO_GUIDANCE, FewStep
from sdxl_worker.request import FIELDS
from sdxl_worker.request.refinement import refinement_of
from sdxl_worker.request.sampling import sampling_problems, sampling_warnings
from sdxl_worker.request.validation import combined_problems
from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS, SCHEDULES

if TYPE_CHECKING:
    from sdxl_worker.lora.ready import ReadyLora
    from sdxl_worker.request import GenerationRequest

# What the answer says was used, where the sampler has it.
_SETTINGS = ("scheduler", "schedule_type", "num_inference_steps", "timesteps", "eta", "guidance_scale")


@dataclass(frozen=True)
class Settled:
    """The request as it is drawn, what the answer says about it (empty where no LoRA had a say), and warnings."""

    request: GenerationRequest
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def settle(request: GenerationRequest, loras: Sequence[ReadyLora]) -> Settled:
    """What the first few-step LoRA among `loras` wants takes the place of what the request leaves out.

    Raises InvalidRequest for what is wrong with the fields together, now that each has its value.
    """
    kinds = [(lora, lora.few_step) for lora in loras if lora.spec.scale.unet > 0]
    found = [(lora, kind) for lora, kind in kinds if kind is not None]
    chosen = _chosen(request, found[0][1]) if found else {}
    if request.values and (problems := combined_problems({**request.values, **chosen})):
        raise InvalidRequest("; ".join(problems))
    if not found:
        return Settled(request)
    (lora, kind), *others = found
    drawn = dataclasses.replace(request, **chosen, warnings=_warnings(request, chosen))
    used = {name: value for name in _SETTINGS if (value := getattr(drawn, name)) is not None}
    if SCHEDULERS[drawn.scheduler].eta is None:
        used.pop("eta", None)
    settings = {"lora": lora.file.name, "kind": kind.name, "chosen": list(chosen), **used}
    warnings = [
        *_differences(kind, drawn, chosen, lora.spec.label),
        *(
            f"{other.spec.label}: it is {its.name}, and {lora.spec.label} is {kind.name}: two few-step LoRAs spoil the "
            "picture, and the settings are those of the first"
            for other, its in others
        ),
    ]
    if drawn.negative_prompt and drawn.guidance_scale <= NO_GUIDANCE and "guidance_scale" in chosen:
        warnings.append(f"negative_prompt has no effect: {lora.spec.label} is {kind.name}, drawn without guidance")
    if refinement_of(drawn) is not None:
        warnings.append(
            f"{lora.spec.label} is {kind.name} and does not reach the refiner, which draws with the same sampler and "
            "guidance: the picture may be spoilt"
        )
    return Settled(drawn, settings, tuple(warnings))


def _warnings(request: GenerationRequest, chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """The request's, where those about the sampler are about the one that is chosen."""
    before = _values_of(request)
    old, new = sampling_warnings(before), sampling_warnings({**before, **chosen})
    return (*(warning for warning in request.warnings if warning not in old), *new)


def _chosen(request: GenerationRequest, kind: FewStep) -> dict[str, Any]:
    """The values that `kind` wants for fields that the request leaves out, as far as they go with what it gives."""
    left_out = {name: value for name, value in kind.settings.items() if name not in request.given}
    without_scheduler = {name: value for name, value in left_out.items() if name != "scheduler"}
    tries = [_fitting(request, wanted) for wanted in (left_out, without_scheduler)]
    values = {**_values_of(request), **request.values}
    chosen = next((one for one in tries if not sampling_problems({**values, **one})), tries[1])
    if "num_inference_steps" not in chosen or not request.values:
        return chosen
    return next((one for one in _with_more_steps(chosen) if not combined_problems({**values, **one})), chosen)


def _fitting(request: GenerationRequest, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted` without what the sampler, or the number of steps, has no use for."""
    values = {**_values_of(request), **wanted}
    scheduler = SCHEDULERS[values["scheduler"]]
    timesteps = wanted.get("timesteps")
    fits = {
        "schedule_type": wanted.get("schedule_type") in scheduler.schedules,
        "eta": scheduler.eta is not None,
        "timesteps": scheduler.timesteps
        and values["schedule_type"] == AUTOMATIC
        and timesteps is not None
        and len(timesteps) == values["num_inference_steps"],
    }
    return {name: value for name, value in wanted.items() if fits.get(name, True)}


def _with_more_steps(chosen: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`chosen`, then with more and more steps: few may be less than the sampler or the schedule needs, or leave none to
    image-to-image at a low strength.
    """
    yield dict(chosen)
    for steps in range(chosen["num_inference_steps"] + 1, FIELDS["num_inference_steps"].default + 1):
        more = {name: value for name, value in chosen.items() if name != "timesteps"}
        yield {**more, "num_inference_steps": steps}


def _values_of(request: GenerationRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in FIELDS}


def _differences(kind: FewStep, drawn: GenerationRequest, chosen: Mapping[str, Any], label: str) -> tuple[str, ...]:
    """A warning that says what `kind` wants, where something else is drawn that was not chosen for it."""
    wanted = dict(kind.settings)
    differs = {
        "scheduler": drawn.scheduler != wanted["scheduler"],
        "schedule_type": "schedule_type" in wanted
        and SCHEDULES[drawn.schedule_type].options != SCHEDULES[wanted["schedule_type"]].options,
        "num_inference_steps": not kind.steps[0] <= drawn.num_inference_steps <= kind.steps[1],
        "guidance_scale": not kind.guidance[0] <= drawn.guidance_scale <= kind.guidance[1],
    }
    names = [name for name, different in differs.items() if different and name not in chosen]
    if not names:
        return ()
    ranges = {
        "scheduler": wanted["scheduler"],
        "schedule_type": wanted.get("schedule_type"),
        "num_inference_steps": _range(*kind.steps),
        "guidance_scale": _range(*kind.guidance),
    }
    wants = _listed([f"{name} {ranges[name]}" for name in names])
    has = _listed([f"{name} {_shown(getattr(drawn, name))}" for name in names])
    return (f"{label}: it is {kind.name}, which wants {wants}; drawn with {has} the picture may be spoilt",)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:-1]) + f" and {texts[-1]}" if len(texts) > 1 else texts[0]
