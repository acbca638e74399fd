"""bench.rendering: every row is measured against the baseline, and the pipeline is as it was afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench import compiled_switch, rendering, settings_table
from bench.compiled_state import Compiled
from bench.settings_table import BASELINE, Row
from bench.worker_sdxl import difference
from sdxl_worker import topology
from sdxl_worker.generate import compiled
from tests.support.lora_files import weight_hash

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(autouse=True)
def _dynamo_forgets() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def addresses(pipeline: Any) -> list[int]:
    return [parameter.data_ptr() for model in (pipeline.unet, pipeline.vae) for parameter in model.parameters()]


def layouts(pipeline: Any) -> list[tuple[int, ...]]:
    return [parameter.stride() for model in (pipeline.unet, pipeline.vae) for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_is_measured_and_nothing_stays_changed(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamo alone, and one size: what inductor makes of it is measured by the command."""
    monkeypatch.setattr(compiled, "warm_up", lambda _pipeline: None)
    monkeypatch.setattr(settings_table, "OPT_INS", ({"unheard_of": 1}, {"cfg_end": 0.5}))
    monkeypatch.setattr(compiled_switch, "SWITCHES", 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipeline = topology.build_sdxl(device=device)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).eval().requires_grad_(False)
    before = weight_hash(pipeline), addresses(pipeline), layouts(pipeline), pipeline.scheduler
    options = argparse.Namespace(size=64, steps=1, repeats=1, backend="eager", parts=["table", "switch"])
    results = rendering.run_on(pipeline, options)
    assert (weight_hash(pipeline), addresses(pipeline), layouts(pipeline), pipeline.scheduler) == before
    assert all(module._compiled_call_impl is None for module in pipeline.unet.modules())
    rows = results["table"]["rows"]
    assert {BASELINE, "this worker as it comes", "channels_last", "COMPILE=1", "ATTENTION=math"} <= set(rows)
    assert all(result["images_per_second"] > 0 for result in rows.values()), rows
    assert rows["this worker as it comes"]["difference"]["max"] <= 1
    assert rows["COMPILE=1"]["difference"]["max"] <= 1
    assert results["table"]["picture"]["deviation"] > 10
    assert results["table"]["new_graphs_while_measured"] == results["switch"]["new_graphs"] == 0
    assert all(changed["max"] > 0 for changed in results["switch"]["changed_picture"].values())
    assert "COMPILE=1" in rendering.summary(results)
    assert "failed" not in capsys.readouterr().err


def test_a_row_that_fails_says_why_and_stops_no_other(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for this")

    rows = [Row(BASELINE), Row("broken", draws=broken), Row("COMPILE=1")]
    monkeypatch.setattr(settings_table, "rows_for", lambda *_: rows)
    options = argparse.Namespace(size=64, steps=1, repeats=1, backend="eager")
    table = settings_table.table_on(pipeline, options, Compiled(pipeline))
    assert "no memory for this" in table["rows"]["broken"]["failed"]
    assert table["rows"]["COMPILE=1"]["ratio"]["median"] > 0


def test_a_difference_counts_channels_and_pixels() -> None:
    one, other = np.zeros((2, 2, 3), int), np.zeros((2, 2, 3), int)
    other[0, 0] = (3, -5, 0)
    assert difference(one, other) == {"max": 5, "mean": 8 / 12, "share": 0.25}
