"""What the base model predicts, put into the resident scheduler's config, which every sampler is made from.

Zero terminal SNR and why it takes trailing timesteps: https://arxiv.org/abs/2305.08891
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prediction_marks import EPSILON, V_PREDICTION, Prediction
from sdxl_worker.schedulers import AUTOMATIC, SCHEDULERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from sdxl_worker.lora.ready import ReadyLora
    from sdxl_worker.request import GenerationRequest

_SETTING = "PREDICTION_TYPE"

# From zero terminal SNR on the noise levels reach from 4096 to 0.03. Diffusers spreads Beta over them and not over the
# timesteps: nearly all of its steps are where there is nothing to see yet, and the picture is a blur.
_BLURRED_FROM_ZERO_SNR = "beta"


def wanted_prediction(setting: str, said: Prediction) -> Prediction | None:
    """What PREDICTION_TYPE (`setting`, "" for automatic) and the file make of it; None leaves the config as it is."""
    if setting == EPSILON:
        return Prediction(EPSILON, source=_SETTING)
    if setting == V_PREDICTION and said.kind != V_PREDICTION:
        return Prediction(V_PREDICTION, zero_snr=True, source=_SETTING)
    return said if said.kind == V_PREDICTION else None


def predicting(scheduler: SchedulerMixin, prediction: Prediction) -> SchedulerMixin:
    """A scheduler with the config of `scheduler` for a model with this prediction.

    An EulerDiscreteScheduler, whatever it was: not every class keeps `rescale_betas_zero_snr` in its config. A config
    that says the same as the setting stays as it is: it knows more than the setting does.
    """
    import diffusers

    if prediction.source == _SETTING and scheduler.config.prediction_type == prediction.kind:
        return scheduler
    options: dict[str, Any] = {"prediction_type": prediction.kind, "rescale_betas_zero_snr": prediction.zero_snr}
    if prediction.zero_snr:
        options["timestep_spacing"] = "trailing"
    made: SchedulerMixin = diffusers.EulerDiscreteScheduler.from_config(dict(scheduler.config), **options)
    return made


def notes_on_sampler(config: Mapping[str, Any], request: GenerationRequest) -> list[str]:
    """What to tell the caller of how the request's sampler fits `config`, that of the resident scheduler.

    Raises InvalidRequest where the picture would be wrong: a prediction type that the sampler does not know, and Beta
    from zero terminal SNR on.
    """
    scheduler = SCHEDULERS[request.scheduler]
    if config["prediction_type"] not in scheduler.prediction_types:
        fitting = [name for name, other in SCHEDULERS.items() if config["prediction_type"] in other.prediction_types]
        raise InvalidRequest(
            f"scheduler {scheduler.name} does not draw with this base model, which predicts "
            f"{config['prediction_type']}: take {', '.join(fitting)}"
        )
    if not config.get("rescale_betas_zero_snr"):
        return []
    if not scheduler.zero_snr:
        fitting = [name for name, other in SCHEDULERS.items() if other.zero_snr]
        return [
            f"scheduler {scheduler.name} leaves out the zero terminal SNR that this base model was trained with, so "
            f"that brightness and colours are a little off; these have it: {', '.join(fitting)}"
        ]
    if request.schedule_type == _BLURRED_FROM_ZERO_SNR:
        fitting = [AUTOMATIC, *(name for name in scheduler.schedules if name != request.schedule_type)]
        raise InvalidRequest(
            f"with this base model (zero terminal SNR) scheduler {scheduler.name} takes schedule_type "
            f"{', '.join(fitting)}, not {request.schedule_type}"
        )
    return []


def notes_on_loras(config: Mapping[str, Any], loras: Sequence[ReadyLora]) -> list[str]:
    """A warning for each LoRA that says that it was trained to predict v, where the base model predicts the noise."""
    if config["prediction_type"] != EPSILON:
        return []
    return [
        f"{lora.spec.label}: it was trained on a base model that predicts v, and this one predicts epsilon: "
        "the picture may be spoilt"
        for lora in loras
        if lora.parsed.facts.prediction == V_PREDICTION
    ]
