"""Memory that runs out at each stage of a job: for real on a GPU, by torch's own error on the CPU.

Afterwards the answer has its code, every weight its bits, the memory is free, and the next picture is that of before.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker.generate.refiner import Refiner
from sdxl_worker.lora.engine import LoraEngine
from tests.gpu.tiny_worker import FORMATS, TinyWorker, loras
from tests.support.device_memory import RunsOutAt, running_out

LORAS: dict[str, Any] = {"loras": loras(*FORMATS)}


def _picture() -> str:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _always(*_: object) -> bool:
    return True


def _larger(sample: torch.Tensor, *_: object) -> bool:
    """Of the second pass: the first draws 64 pixels, and those are 8 latents."""
    return sample.shape[-1] > 8


class _Call:
    """True for the call with that number."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, *_: object) -> bool:
        self._left -= 1
        return self._left == 0


@contextlib.contextmanager
def _casting(tiny: TinyWorker, time: int) -> Iterator[None]:
    """Memory runs out when half of the VAE has been cast, which is done to float32 and back."""
    tiny.memory.ran_out = 0
    cast, calls = torch.nn.Module._apply, 0
    modules = len(list(tiny.pipeline.vae.modules()))

    def counted(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        nonlocal calls
        calls += 1
        if calls == int(modules * (time - 0.5)):
            tiny.memory.run_out()
        return cast(module, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", counted)
        try:
            yield
        finally:
            tiny.memory.release()


@contextlib.contextmanager
def _refiners_turn(tiny: TinyWorker) -> Iterator[None]:
    """A refiner that waits in host memory, and none on the device when its turn comes."""
    assert tiny.refiner is not None
    turn = Refiner.turn
    tiny.memory.ran_out = 0

    @contextlib.contextmanager
    def without_memory(refiner: Refiner) -> Iterator[None]:
        tiny.memory.run_out()
        with turn(refiner):
            yield

    unet = tiny.refiner.pipeline.unet
    object.__setattr__(tiny.refiner, "waits_in_host_memory", True)
    where = [(tensor, tensor.data) for tensor in (*unet.parameters(), *unet.buffers())]
    try:
        for tensor, data in where:
            tensor.data = data.cpu().pin_memory() if tiny.device == "cuda" else data
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Refiner, "turn", without_memory)
            yield
    finally:
        tiny.memory.release()
        assert {tensor.device.type for tensor, _ in where} == {"cpu"}
        for tensor, data in where:
            tensor.data = data
        object.__setattr__(tiny.refiner, "waits_in_host_memory", False)


Stage = tuple[dict[str, Any], Callable[[TinyWorker], AbstractContextManager[None]]]


def _in(component: str, when: Callable[[], Callable[..., bool]] = lambda: _always, **fields: Any) -> Stage:
    """Memory runs out before a call of that module."""

    def fault(tiny: TinyWorker) -> AbstractContextManager[None]:
        root, _, name = component.partition(".")
        owner = tiny.refiner.pipeline if root == "refiner" and tiny.refiner else tiny.pipeline
        module = getattr(owner, name) if root == "refiner" else getattr(owner, root).get_submodule(name)
        return running_out(tiny.memory, module, when())

    return fields, fault


# What is drawn, and how memory runs out meanwhile.
STAGES: dict[str, Stage] = {
    "text encoding": _in("text_encoder"),
    "text encoding with loras": _in("text_encoder_2", **LORAS),
    "first step": _in("unet"),
    "third step, loras": _in("unet", lambda: _Call(3), **LORAS),
    "inside the unet": _in("unet.mid_block.attentions.0", lambda: _Call(2), **LORAS),
    "second pass": _in("unet", lambda: _larger, hires={"scale": 2, "steps": 2}, **LORAS),
    "encoding a picture": _in("vae.encoder", image=_picture(), strength=0.7, **LORAS),
    "casting the vae": (LORAS, functools.partial(_casting, time=1)),
    "casting the vae back": (LORAS, functools.partial(_casting, time=2)),
    "decoding": _in("vae.decoder", **LORAS),
    "inside the decoder": _in("vae.decoder.up_blocks.3", **LORAS),
    "refining": _in("refiner.unet", refiner_inference_steps=4, high_noise_frac=0.5, **LORAS),
    "refiner's turn": ({"refiner_inference_steps": 4, "high_noise_frac": 0.5, **LORAS}, _refiners_turn),
}


@dataclass(frozen=True)
class Resident:
    """A worker that has done all there is to do once: what stays for good is there, such as the pristine copies."""

    tiny: TinyWorker
    bits: list[str]
    plain: list[str]
    in_use: int

    def check(self) -> None:
        """Weights, memory in use and pictures are those of before."""
        assert self.tiny.bits() == self.bits
        assert self.tiny.memory.in_use == self.in_use
        assert self.tiny.pictures() == self.plain


@pytest.fixture(scope="module")
def resident(tiny: TinyWorker) -> Resident:
    bits = tiny.bits()
    # Memory is counted on a GPU alone.
    for fields, _ in STAGES.values() if tiny.device == "cuda" else ():
        tiny.pictures(**fields)
    plain = tiny.pictures()
    return Resident(tiny, bits, plain, tiny.memory.in_use)


@pytest.mark.parametrize("stage", STAGES)
def test_row_49_at_each_stage_of_rendering(stage: str, resident: Resident) -> None:
    fields, fault = STAGES[stage]
    tiny = resident.tiny
    with fault(tiny):
        answer = tiny.answer(**fields)
    assert tiny.memory.ran_out == 1
    assert answer["error"].startswith("OUT_OF_MEMORY: "), answer
    assert "refresh_worker" not in answer
    resident.check()


@pytest.mark.parametrize("names", [FORMATS, FORMATS[:1]], ids=["four loras", "one lora"])
def test_while_loras_are_merged(names: tuple[str, ...], resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the picture's fault, so that it ends no worker however often it happens."""
    apply, tiny = LoraEngine.apply, resident.tiny
    number, counted = 0, RunsOutAt(tiny.memory, 0)

    def without_memory(*arguments: Any) -> Any:
        nonlocal counted
        counted = RunsOutAt(tiny.memory, number)
        with counted:
            return apply(*arguments)

    monkeypatch.setattr(LoraEngine, "apply", without_memory)
    merged = tiny.pictures(loras=loras(*names))
    operations = counted.count
    assert operations
    for share in (0.0, 0.3, 0.6, 0.95):
        number = 1 + int(share * operations)
        tiny.memory.ran_out = 0
        answer = tiny.answer(loras=loras(*names))
        tiny.memory.release()
        assert tiny.memory.ran_out == 1
        assert answer["error"].partition(":")[0] in ("OUT_OF_MEMORY", "LORA_INCOMPATIBLE"), answer
        assert "refresh_worker" not in answer
        number = 0
        resident.check()
    assert tiny.pictures(loras=loras(*names)) == merged


@pytest.mark.gpu
@pytest.mark.parametrize("tiny", ["cuda"], indirect=True)
def test_a_batch_that_does_not_fit_is_drawn_in_smaller_ones(tiny: TinyWorker) -> None:
    """By a limit of torch's allocator, which the estimate of what is free does not know of."""
    small = {"width": 512, "height": 512, "num_inference_steps": 1}
    peaks = []
    for pictures in (1, 8):
        tiny.pictures(num_images=pictures, **small)
        torch.cuda.reset_peak_memory_stats()
        tiny.pictures(num_images=pictures, **small)
        peaks.append(torch.cuda.max_memory_allocated() - tiny.memory.in_use)
    before, in_use, failures = tiny.bits(), tiny.memory.in_use, torch.cuda.memory_stats()["num_ooms"]
    tiny.memory.leave(sum(peaks) // 2)
    drawn = tiny.pictures(num_images=8, **small)
    tiny.memory.release()
    assert len(drawn) == 8
    assert torch.cuda.memory_stats()["num_ooms"] > failures
    assert (tiny.bits(), tiny.memory.in_use) == (before, in_use)
