"""How a file says what its model predicts: the noise (epsilon), or v, and whether with zero terminal SNR.

A checkpoint says that it predicts v by the empty tensors `v_pred` and `ztsnr` (ComfyUI, SimpleTuner); it and a LoRA by
`modelspec.prediction_type` (https://github.com/Stability-AI/ModelSpec; kohya), `modelspec.predict_key` (ComfyUI) or
`ss_*` of kohya's forks. Zero terminal SNR: https://arxiv.org/abs/2305.08891
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

EPSILON, V_PREDICTION, EDM = "epsilon", "v_prediction", "EDM"
# Some tools put all of a file under the UNet's prefix.
_PREFIXES = ("", "model.diffusion_model.")
# How the metadata may say it, and in which words.
_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key")
_V_WORDS = frozenset({"v", "v_prediction", "v-prediction", "vpred", "v_pred", "v-pred"})
_EPSILON_WORDS = frozenset({"epsilon", "eps"})
_TRUE, _FALSE = frozenset({"true", "1"}), frozenset({"false", "0"})


@dataclass(frozen=True)
class Prediction:
    """What a model predicts (`epsilon`, `v_prediction`, or `EDM`, which has schedulers of its own).

    `zero_snr`: it was trained down to a signal of zero. `source` is what in the file says so, "" where nothing does.
    """

    kind: str = EPSILON
    zero_snr: bool = False
    source: str = ""


def read_prediction(names: Collection[str], metadata: Mapping[str, str]) -> Prediction:
    """What a file with these tensor names and this metadata says; a tensor counts before the metadata.

    The tensor `v_pred` without `ztsnr` says that there is no zero terminal SNR, since who writes the one knows the
    other. Metadata says v only, and zero terminal SNR is then taken for given, as SDXL's v-prediction models have it.
    """
    for mark in ("edm_vpred.sigma_max", "edm_mean"):
        if mark in names:
            return Prediction(EDM, source=f"the tensor {mark}")
    for prefix in _PREFIXES:
        if f"{prefix}v_pred" in names:
            has_zero_snr = any(f"{other}ztsnr" in names for other in _PREFIXES)
            return Prediction(V_PREDICTION, has_zero_snr, f"the tensor {prefix}v_pred")
    return _of_metadata(metadata)


def _of_metadata(metadata: Mapping[str, str]) -> Prediction:
    for field in _FIELDS:
        word = metadata.get(field, "").strip().lower()
        if word in _V_WORDS:
            return Prediction(V_PREDICTION, _zero_snr_of(metadata), field)
        if word in _EPSILON_WORDS:
            return Prediction(EPSILON, source=field)
    # kohya's forks.
    for field in ("ss_v_parameterization", "ss_v_prediction"):
        if metadata.get(field, "").strip().lower() in _TRUE:
            return Prediction(V_PREDICTION, _zero_snr_of(metadata), field)
    return Prediction()


def _zero_snr_of(metadata: Mapping[str, str]) -> bool:
    return metadata.get("ss_zero_terminal_snr", "").strip().lower() not in _FALSE
