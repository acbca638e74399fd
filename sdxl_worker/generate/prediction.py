"""What the base model predicts, put into the resident scheduler's config, which every sampler is made from.

Zero terminal SNR and why it takes trailing timesteps: https://arxiv.org/abs/2305.08891
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_worker.prediction_marks import EPSILON, V_PREDICTION, Prediction

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from sdxl_worker.lora.ready import ReadyLora


def wanted_prediction(setting: str, said: Prediction) -> Prediction | None:
    """What PREDICTION_TYPE (`setting`, "" for automatic) and the file make of it; None leaves the config as it is."""
    if setting == EPSILON:
        return Prediction(EPSILON, source="PREDICTION_TYPE")
    if setting == V_PREDICTION and said.kind != V_PREDICTION:
        return Prediction(V_PREDICTION, zero_snr=True, source="PREDICTION_TYPE")
    return said if said.kind == V_PREDICTION else None


def predicting(scheduler: SchedulerMixin, prediction: Prediction) -> SchedulerMixin:
    """A scheduler with the config of `scheduler` for a model with this prediction.

    An EulerDiscreteScheduler, whatever it was: not every class keeps `rescale_betas_zero_snr` in its config.
    """
    import diffusers

    options: dict[str, Any] = {"prediction_type": prediction.kind, "rescale_betas_zero_snr": prediction.zero_snr}
    if prediction.zero_snr:
        options["timestep_spacing"] = "trailing"
    made: SchedulerMixin = diffusers.EulerDiscreteScheduler.from_config(dict(scheduler.config), **options)
    return made


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
