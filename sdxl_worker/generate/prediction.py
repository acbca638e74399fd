"""What the base model predicts, put into the resident scheduler's config: every sampler is made from it.

Zero terminal SNR and why it takes trailing timesteps: https://arxiv.org/abs/2305.08891
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_worker.generate.checkpoint_facts import EPSILON, V_PREDICTION, Prediction

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


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
