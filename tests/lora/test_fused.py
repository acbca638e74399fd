"""One launch merges many weights: by Triton's interpreter here, by the kernel itself on a GPU, compiled for all.

The interpreter multiplies the bits of bfloat16 and cuts off where a GPU rounds to it: such factors are for the GPU.
"""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_worker import resident as resident_module
from sdxl_worker import topology
from sdxl_worker.errors import LoraIncompatible, RestoreFailed
from sdxl_worker.lora import engine as lora_engine
from sdxl_worker.lora import fused, kernel, merge
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.lora.factors import Part
from sdxl_worker.lora.formats.low_rank import LowRank
from sdxl_worker.lora.fused import FusedMerger, KernelFailed
from sdxl_worker.request import LoraScale
from sdxl_worker.settings import Settings
from tests.support.lora_files import CONV, CROSS, LINEAR, kohya, lokr, lora, save
from tests.support.operations import Waits

pytest.importorskip("triton")

GPU = pytest.mark.gpu
CPU_AND_GPU = ("cpu", pytest.param("cuda", marks=GPU))
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SMALL = ((70, 24), (24, 16, 1, 1), (24, 8, 3, 3), (9, 5, 3, 3), (7,))
# Of SDXL's own, the largest matrix among them.
LARGE = ((10240, 1280), (640, 2048), (320, 4, 3, 3), (1280, 1920, 3, 3), (640, 320, 1, 1))


@pytest.fixture(params=CPU_AND_GPU)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernel runs; on the CPU interpreted, which is not tried beside a GPU: it patches Triton's language."""
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("the GPU runs the kernel itself")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tiles of each launch."""
    found: list[int] = []
    run = FusedMerger._run

    def counted(self, table, of_tile, *rest):
        found.append(of_tile.numel())
        run(self, table, of_tile, *rest)

    monkeypatch.setattr(FusedMerger, "_run", counted)
    return found


def weights(shapes, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Normal values in every shape, convolutions in both memory orders."""
    random, found = torch.Generator().manual_seed(0), {}
    for shape in shapes:
        weight = torch.randn(shape, generator=random).to(device, dtype)
        found[str(shape)] = weight
        if weight.ndim == 4:
            found[f"{shape} channels_last"] = weight.clone(memory_format=torch.channels_last)
    return found


def file_of(live: dict[str, Tensor], rank: int, dtype: torch.dtype) -> tuple[dict[str, LowRank], Tensor]:
    """A LoRA for every matrix whose factors are views of one buffer, at odd multiples of their size."""
    random = torch.Generator().manual_seed(rank)
    matrices = {name: weight for name, weight in live.items() if weight.ndim > 1}
    values = [
        torch.randn(shape, generator=random).to(dtype)
        for weight in matrices.values()
        for shape in ((weight.shape[0], rank), (rank, weight[0].numel()))
    ]
    one = torch.zeros(1, dtype=dtype)
    data = torch.cat([part for value in values for part in (one, value.flatten())])
    views, at = [], 0
    for value in values:
        views.append(data[at + 1 : at + 1 + value.numel()].view(value.shape))
        at += value.numel() + 1
    pairs = zip(matrices, views[::2], views[1::2], strict=True)
    return {name: LowRank(up, down, 1 / rank) for name, up, down in pairs}, data.view(torch.uint8)


def steps_off(result: Tensor, expected: Tensor) -> float:
    """The largest distance from `expected` (float64) in steps of the dtype there; 0.5 is a correct rounding."""
    result, info = result.detach(), torch.finfo(result.dtype)
    step = torch.exp2(expected.abs().clamp_min(info.tiny).log2().floor()) * info.eps
    # What float32 sums of this size are off by, however small the result is where terms cancel.
    slack = 64 * torch.finfo(F32).eps
    return float((((result.double() - expected).abs() - slack).clamp_min(0) / step).max())


DTYPES, RANKS = (F16, BF16, F32), (1, 2, 5, 16, 64, 256)
MIXED = ((1, F16), (40, F32))
ALL = ((256, F16), (4, BF16), (64, F32), (128, BF16))


@pytest.mark.parametrize(
    ("dtype", "shapes", "files"),
    [
        *((dtype, SMALL, MIXED) for dtype in (F16, BF16, F32)),
        (F16, SMALL, ((33, F16),)),
        (F32, SMALL, ((5, F32),)),
        *(pytest.param(dtype, SMALL, ((rank, dtype),), marks=GPU) for dtype in DTYPES for rank in RANKS),
        *(pytest.param(dtype, LARGE, files, marks=GPU) for dtype in DTYPES for files in (((32, F16),), ALL)),
    ],
)
def test_it_is_the_formula_rounded_once(device: str, dtype: torch.dtype, shapes, files):
    live = weights(shapes, dtype, device)
    pristine = {name: weight.clone() for name, weight in live.items()}
    places = {name: (weight.data_ptr(), weight.stride()) for name, weight in live.items()}
    merger = FusedMerger(live)
    expected = {name: weight.double() for name, weight in live.items()}
    parts = []
    for scale, (rank, of) in zip((0.8, -1.3, 0.25, 0.5), files, strict=False):
        changes, data = file_of(live, rank, of)
        parts.append(Part(merger.factors_of(changes, data), data.to(device), np.full(len(live), scale)))
        for name, change in changes.items():
            product = change.up.to(device).double() @ change.down.to(device).double()
            expected[name] += (scale * change.factor * product).reshape(expected[name].shape)

    assert merger.targets(parts) == [name for name, weight in live.items() if weight.ndim > 1]
    merger.merge(parts, {name: pristine[name] for name in merger.targets(parts)})

    allowed = 1.0 if device == "cpu" and dtype == BF16 else 0.5
    off = {name: steps_off(weight, expected[name]) for name, weight in live.items()}
    assert {name: value for name, value in off.items() if value > allowed} == {}
    assert {name: (weight.data_ptr(), weight.stride()) for name, weight in live.items()} == places


def test_what_does_not_fit_a_weight_is_not_for_the_kernel():
    """Nothing checks an address on the device."""
    live = weights(((24, 16), (40, 24), (8, 8)), F16, "cpu")
    changes, data = file_of(live, 4, F16)
    first, second, third = changes.values()
    wrong = {
        "(24, 16)": LowRank(first.up, second.down, 1.0),
        "(40, 24)": LowRank(second.up, second.down.clone(), 1.0),
        "(8, 8)": LowRank(third.up, third.up.t(), 1.0),
    }
    found = FusedMerger(live).factors_of(wrong, data)
    assert (found.weights.tolist(), sorted(found.others.tolist())) == ([], [0, 1, 2])


def test_a_model_may_change_the_order_of_its_convolutions(device: str):
    """As the whole UNet is laid out anew: the parameters stay, their data do not."""
    weight = torch.nn.Parameter(weights(((24, 8, 3, 3),), F16, device)["(24, 8, 3, 3)"], requires_grad=False)
    merger = FusedMerger({"weight": weight})
    changes, data = file_of({"weight": weight}, 4, F16)
    part = Part(merger.factors_of(changes, data), data.to(device), np.ones(1))
    change = changes["weight"].up.double() @ changes["weight"].down.double() / 4
    expected = weight.double().cpu() + change.view(weight.shape)
    weight.data = weight.data.to(memory_format=torch.channels_last)
    merger.merge([part], {"weight": weight})
    assert steps_off(weight.cpu(), expected) <= 0.5
    with pytest.raises(KernelFailed, match="copy"):
        merger.merge([part], {"weight": weight.contiguous()})
    weight.data = weight.data.transpose(0, 1)
    with pytest.raises(KernelFailed, match="not known"):
        merger.merge([part], {"weight": weight})


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=GPU)])
def test_a_merge_waits_for_nothing(device: str, monkeypatch: pytest.MonkeyPatch):
    """On the CPU with the meta device in the GPU's place, and nothing in the kernel's."""
    host = weights(SMALL, F16, "cpu")
    live = {name: weight.to(device) for name, weight in host.items()}
    changes, data = file_of(host, 4, F16)
    merger, moved = FusedMerger(live), data.to(device)
    pristine = {name: live[name].clone() for name in changes}
    if device == "meta":
        monkeypatch.setattr(FusedMerger, "_check", lambda *_: None)
        monkeypatch.setattr(FusedMerger, "_run", lambda *_: None)

    def merge(strength: float) -> None:
        merger.merge([Part(merger.factors_of(changes, data), moved, np.full(len(live), strength))], pristine)

    if device == "meta":
        with Waits() as waits:
            merge(0.5)
        assert waits.names == []
        return
    # The first time it compiles and checks.
    merge(0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge(-0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


MODULES = {
    LINEAR: "lora_unet_",
    CROSS: "lora_unet_",
    CONV: "lora_unet_",
    "down_blocks.1.resnets.0.conv_shortcut": "lora_unet_",
    "text_model.encoder.layers.0.self_attn.q_proj": "lora_te1_",
}
SCALE, OTHER_SCALE = LoraScale(0.8, -0.5, 0.3), LoraScale.uniform(-0.3)


class Resident:
    """A tiny SDXL in float16 whose engine merges with the kernel."""

    def __init__(self, device: str) -> None:
        self.pipeline = topology.build_sdxl(dtype=F16, device=device)
        self.pipeline.unet.to(memory_format=torch.channels_last)
        # What the engine chooses by itself on CUDA.
        self.engine = LoraEngine(self.pipeline, 2**30, fused=FusedMerger if device == "cpu" else None)
        self.pristine = {name: self.weight(name).detach().clone() for name in MODULES}

    def weight(self, module: str) -> Tensor:
        root = self.pipeline.text_encoder if MODULES[module] == "lora_te1_" else self.pipeline.unet
        names = {name.removeprefix("text_model."): tensor for name, tensor in root.named_parameters()}
        return names[f"{module.removeprefix('text_model.')}.weight"]

    def file(self, path: Path, seed: int, dtype: torch.dtype, other: tuple[str, ...] = ()):
        """A LoRA for all of MODULES, of another format for `other`, and the change of each weight in float64."""
        tensors: dict[str, Tensor] = {}
        changes: dict[str, Tensor] = {}
        for module, prefix in MODULES.items():
            weight = self.pristine[module].cpu().float()
            if module in other:
                made, changes[module] = lokr(weight)
            else:
                made, _ = lora(weight, 4, 2.0, seed)
                made = {name: tensor.to(dtype) for name, tensor in made.items()}
                up, down = (made[f"lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
                changes[module] = (0.5 * (up @ down)).reshape(weight.shape)
            tensors |= kohya(module, made, prefix)
        return self.engine.read(save(path, tensors)), changes

    def off(self, *applied) -> float:
        """How far the weights are from the formula for (changes, scale) pairs, as `steps_off` counts."""
        worst = 0.0
        for module, pristine in self.pristine.items():
            expected = pristine.double().cpu()
            for changes, scale in applied:
                strength = scale.text_encoder if module.startswith("text_model") else scale.unet
                expected = expected + strength * changes[module]
            worst = max(worst, steps_off(self.weight(module).cpu(), expected))
        return worst

    @property
    def is_pristine(self) -> bool:
        return all(torch.equal(self.weight(module), before) for module, before in self.pristine.items())


@pytest.fixture(scope="module")
def residents():
    """The one for each device, made when first asked for."""
    return {}


@pytest.fixture
def resident(residents: dict[str, Resident], device: str, monkeypatch: pytest.MonkeyPatch):
    if device not in residents:
        residents[device] = Resident(device)
    found = residents[device]
    yield found
    found.engine.restore()
    # A test may have made the kernel fail.
    found.engine._merger._fused = found.engine._fused


@pytest.mark.parametrize("place", ["device", "host"])
def test_one_launch_merges_all_low_rank_changes_of_a_request(resident, launches, tmp_path, monkeypatch, place):
    """Also where the pristine copies are not beside the weights."""
    monkeypatch.setattr(resident.engine._merger, "_place", place)
    monkeypatch.setattr(resident.engine._merger, "_pristine", {})
    (one, changes), (two, more) = (resident.file(tmp_path / f"{seed}", seed, F16) for seed in (1, 2))
    before = {name: (resident.weight(name).data_ptr(), resident.weight(name).stride()) for name in MODULES}
    resident.engine.apply([(one, SCALE), (two, OTHER_SCALE)])
    launches.clear()
    for _ in range(2):
        resident.engine.apply([(one, SCALE), (two, OTHER_SCALE)])
        assert resident.off((changes, SCALE), (more, OTHER_SCALE)) <= 0.5
    assert len(launches) == 2
    assert {name: (resident.weight(name).data_ptr(), resident.weight(name).stride()) for name in MODULES} == before
    resident.engine.reapply_unet([(two, OTHER_SCALE)], switched=[(one, SCALE)])
    assert len(launches) == 3
    assert resident.off((changes, LoraScale(0, -0.5, 0)), (more, OTHER_SCALE)) <= 0.5
    resident.engine.restore()
    assert resident.is_pristine


def test_other_formats_and_what_they_share_a_weight_with_go_without_the_kernel(resident, launches, tmp_path):
    (plain, changes), (mixed, more) = (
        resident.file(tmp_path / "plain", 1, F32),
        resident.file(tmp_path / "mixed", 2, F32, other=(LINEAR, CONV)),
    )
    resident.engine.apply([(plain, SCALE)])
    whole = launches[-1]
    launches.clear()
    resident.engine.apply([(plain, SCALE), (mixed, OTHER_SCALE)])
    # One tile of 64 x 64 for LINEAR, 16 x 144 values of CONV in three.
    assert launches == [whole - 4]
    assert resident.off((changes, SCALE), (more, OTHER_SCALE)) <= 0.5
    # Of no strength there, the other format leaves the weight to the kernel.
    launches.clear()
    resident.engine.apply([(plain, SCALE), (mixed, LoraScale(0, 1, 1))])
    assert launches == [whole]
    assert resident.off((changes, SCALE), (more, LoraScale(0, 1, 1))) <= 0.5
    resident.engine.restore()
    assert resident.is_pristine


def fail() -> None:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(("run", "word"), [(fail, "C compiler"), (lambda: None, "wrong numbers")])
def test_a_kernel_that_does_not_work_costs_a_warning_once(resident, tmp_path, monkeypatch, caplog, run, word):
    calls: list[int] = []

    def counted(*_arguments: object) -> None:
        calls.append(1)
        run()

    monkeypatch.setattr(FusedMerger, "_run", counted)
    monkeypatch.setattr(resident.engine._fused, "_checked", set())
    parsed, changes = resident.file(tmp_path / "a", 1, F16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            resident.engine.apply([(parsed, SCALE)])
            assert resident.off((changes, SCALE)) <= 0.5
    (warning,) = [record.getMessage() for record in caplog.records]
    assert word in warning
    assert len(calls) == 1
    resident.engine.restore()
    assert resident.is_pristine


def test_no_memory_is_the_requests_affair_and_not_the_kernels(resident, launches, tmp_path, monkeypatch):
    parsed, changes = resident.file(tmp_path / "a", 1, F16)

    def no_memory(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FusedMerger, "_run", no_memory)
        with pytest.raises(LoraIncompatible, match="memory"):
            resident.engine.apply([(parsed, SCALE)])
    assert resident.is_pristine
    resident.engine.apply([(parsed, SCALE)])
    assert launches
    assert resident.off((changes, SCALE)) <= 0.5


def lost(*_arguments: object, **_keywords: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("met", ["launching", "rendering", "without the kernel"])
def test_a_device_lost_under_the_kernel_has_one_line_on_how_to_do_without(resident, tmp_path, monkeypatch, caplog, met):
    """Wherever the fault is met first."""
    engine = resident.engine
    (parsed, _), hint = resident.file(tmp_path / "a", 1, F16), "LORA_KERNEL=0 does without the kernel"
    if met == "without the kernel":
        engine._merger._fused = None
    with monkeypatch.context() as patch:
        if met == "launching":
            patch.setattr(FusedMerger, "_run", lost)
            patch.setattr(merge, "_merge_one", lost)
            patch.setattr(torch, "_foreach_copy_", lost)
        with pytest.raises(RestoreFailed), engine.applied([(parsed, SCALE)]):
            patch.setattr(torch, "_foreach_copy_", lost)
    assert caplog.text.count(hint) == (met != "without the kernel")
    engine.restore()
    # What was merged later by torch is not the kernel's.
    caplog.clear()
    engine._merger._fused = None
    with monkeypatch.context() as patch, pytest.raises(RestoreFailed), engine.applied([(parsed, SCALE)]):
        patch.setattr(torch, "_foreach_copy_", lost)
    assert hint not in caplog.text


@GPU
def test_putting_back_waits_for_no_other_stream(tmp_path: Path):
    """On which the next job's LoRA may be on its way."""
    resident = Resident("cuda")
    parsed, _ = resident.file(tmp_path / "a", 1, F16)
    with resident.engine.applied([(parsed, SCALE)]):
        pass
    other, done = torch.cuda.Stream(), torch.cuda.Event()
    with resident.engine.applied([(parsed, SCALE)]):
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            torch.cuda._sleep(2_000_000_000)  # of the device's clock: about a second
            done.record()
    assert not done.query()
    assert resident.is_pristine
    torch.cuda.synchronize()


def test_on_the_cpu_nothing_is_merged_at_once(engine):
    assert engine._fused is None


@pytest.mark.parametrize("setting", [0, 1])
def test_the_setting_does_without_the_kernel(pipeline, monkeypatch, setting):
    """A model that says it is on a GPU: making the engine moves nothing."""
    monkeypatch.setattr(lora_engine, "sender_for", lambda _device: None)
    monkeypatch.setattr(type(pipeline), "device", torch.device("cuda"))
    engine = resident_module.Resident(Settings(model_id="tiny", lora_kernel=setting)).engine_of(pipeline)
    assert (engine._fused is not None, engine._merger._fused is not None) == (bool(setting), bool(setting))


@pytest.mark.parametrize(
    ("capability", "weight", "dtypes", "aligned"),
    [(80, "float16", 1, True), (90, "float16", 1, True), (90, "bfloat16", 7, False), (120, "float16", 1, True)],
)
def test_it_compiles_for_what_runpod_rents(tmp_path: Path, monkeypatch, capability, weight, dtypes, aligned):
    """For A100, H100 and Blackwell; no GPU is needed for that."""
    import triton
    from triton import language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"WEIGHT": getattr(language, weight), "DTYPES": dtypes, "ALIGNED": aligned}
    constants |= {"SIDE": FusedMerger.SIDE, "DEPTH": FusedMerger.DEPTH}
    signature = {"table": "*i64", "tiles": "*i32", "parts_at": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(triton.jit(kernel.merge_tiles), signature=signature, constexprs=constants)
    options = {"num_warps": FusedMerger.WARPS, "num_stages": 2}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"]
    assert built.metadata.shared <= 48 * 1024
    # Whole vectors of the weight where it is aligned, and no rounding of float32 factors to TF32.
    assert not aligned or {"ld.global.v4.b32", "st.global.v4.b32"} <= set(built.asm["ptx"].split())
    assert "tf32" not in built.asm["ptx"]


def test_triton_is_imported_when_the_kernel_is_needed():
    """That takes half a second of a cold start."""
    names = []
    for node in ast.parse(Path(fused.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
    assert "numpy" in names
    assert not [name for name in names if "triton" in name or name.endswith("kernel")]
