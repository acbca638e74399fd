"""What a file says that its model predicts."""

from __future__ import annotations

import pytest

from sdxl_worker.prediction_marks import Prediction, read_prediction


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ((), {}, Prediction("epsilon", zero_snr=False, source="")),
        (("ztsnr",), {}, Prediction("epsilon", zero_snr=False, source="")),
        (("v_pred",), {}, Prediction("v_prediction", zero_snr=False, source="the tensor v_pred")),
        (("v_pred", "ztsnr"), {}, Prediction("v_prediction", zero_snr=True, source="the tensor v_pred")),
        (
            ("v_pred", "ztsnr"),
            {"modelspec.prediction_type": "epsilon"},
            Prediction("v_prediction", zero_snr=True, source="the tensor v_pred"),
        ),
        (
            (),
            {"modelspec.prediction_type": "V_Prediction "},
            Prediction("v_prediction", zero_snr=True, source="modelspec.prediction_type"),
        ),
        (
            (),
            {"modelspec.prediction_type": "epsilon"},
            Prediction("epsilon", zero_snr=False, source="modelspec.prediction_type"),
        ),
        ((), {"modelspec.prediction_type": "?"}, Prediction("epsilon", zero_snr=False, source="")),
        (
            (),
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "False"},
            Prediction("v_prediction", zero_snr=False, source="modelspec.prediction_type"),
        ),
        (
            (),
            {"ss_v_parameterization": "True"},
            Prediction("v_prediction", zero_snr=True, source="ss_v_parameterization"),
        ),
        ((), {"ss_v_parameterization": "False"}, Prediction("epsilon", zero_snr=False, source="")),
        (("edm_mean", "edm_std"), {}, Prediction("EDM", zero_snr=False, source="the tensor edm_mean")),
    ],
)
def test_what_it_predicts(names, metadata, expected):
    assert read_prediction(names, metadata) == expected
