"""bench.merge_kernel on the tiny model, with a kernel that does nothing in the real one's place."""

from __future__ import annotations

import argparse
import functools

from bench import merge_kernel
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.fused import FusedMerger
from tests.support.lora_files import weight_hash


class Idle(FusedMerger):
    """Fails with tiles of 128."""

    def _check(self, *_arguments: object) -> None:
        if self.SIDE == 128:
            raise RuntimeError("out of resources")

    def _run(self, *_arguments: object) -> None:
        pass


def test_every_row_is_measured_but_those_that_torch_had_to_take_over(pipeline, monkeypatch):
    before = weight_hash(pipeline)
    monkeypatch.setattr(merge_kernel, "LoraEngine", functools.partial(LoraEngine, fused=Idle))
    found = merge_kernel.run_on(pipeline, argparse.Namespace(repeats=2, counts=[1, 2]))
    assert found["bits_kept"] is True
    assert list(found["failed"]) == ["128 x 128, 32 at a time, 8 warps"]
    assert len(found["cases"]) == 6
    for case in (case for cases in found["cases"].values() for case in cases.values()):
        for name in ("merge_s", "host_s", "restore_s", "copy_s", "copy_ratio"):
            assert 0 < case[name]["min"] <= case[name]["median"] <= case[name]["max"]
    assert weight_hash(pipeline) == before
