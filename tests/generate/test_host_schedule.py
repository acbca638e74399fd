"""No step of any sampler waits for the device.

On the CPU the meta device stands for it: whoever would read a value of a tensor there fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker import topology
from sdxl_worker.generate import render as render_module
from sdxl_worker.generate import samplers
from sdxl_worker.generate.host_schedule import WithoutWaiting
from sdxl_worker.generate.modes import view_of
from sdxl_worker.generate.render import render
from sdxl_worker.request import GenerationRequest
from sdxl_worker.schedulers import scheduler_names
from tests.support.operations import Waits
from tests.support.pictures import farthest

TEXT, INPAINT = "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"
SIZE = {"height": 64, "width": 64}
ARGUMENTS: dict[str, dict[str, Any]] = {
    TEXT: SIZE,
    INPAINT: {"image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (64, 64)), "strength": 0.99, **SIZE},
}
STEPS = 5
ON_META_AND_CUDA = pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Tiny pipelines by the device that they are on."""
    return {}


@pytest.fixture
def drawing(device: str, pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny pipeline on `device`; on the meta device with what that has no answer to, or a slow one, replaced."""
    pipeline = on(pipelines, device)
    if device == "meta":
        monkeypatch.setattr(pipeline.unet, "forward", predicted_on_meta)
        # torchsde's noise, which asks for a generator of the device.
        monkeypatch.setattr(
            "torchsde._brownian.brownian_interval._randn",
            lambda size, dtype, device, _seed: torch.empty(size, dtype=dtype, device=device),
        )
    return pipeline


def on(pipelines: dict[str, Any], device: str) -> Any:
    if device not in pipelines:
        pipelines[device] = topology.build_sdxl(device=device)
        pipelines[device].set_progress_bar_config(disable=True)
        pipelines[device].unet.eval().requires_grad_(False)
    return pipelines[device]


def predicted_on_meta(sample: torch.Tensor, timestep: torch.Tensor, **_more: Any) -> tuple[torch.Tensor]:
    assert timestep.device.type == "meta"
    return (torch.empty_like(sample),)


def require(name: str) -> None:
    """A bare GPU machine may lack what one sampler draws its noise with."""
    if name == "DPM++ SDE":
        pytest.importorskip("torchsde")


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        yield
    assert waits.names == []


def steps_made(pipeline: Any, name: str, class_name: str) -> int:
    """The steps of a call, none of which waits: from the end of the first to the end of the last."""
    device, steps = pipeline.device, 0
    watched = contextlib.ExitStack()

    def on_step(view: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        if step == 0:
            watched.enter_context(no_waits(device.type))
        if step + 1 == view.num_timesteps:
            watched.close()
        return {}

    states = torch.zeros(1, 77, pipeline.unet.config.cross_attention_dim, device=device)
    pooled = torch.zeros(1, pipeline.text_encoder_2.config.projection_dim, device=device)
    words = {f"{sign}prompt_embeds": states for sign in ("", "negative_")}
    words |= {f"{sign}pooled_prompt_embeds": pooled for sign in ("", "negative_")}
    with watched, samplers.applied(pipeline, GenerationRequest("a", scheduler=name)):
        view = view_of(pipeline, class_name)
        samplers.seed(view.scheduler, [1])
        view(
            **words,
            **ARGUMENTS[class_name],
            num_inference_steps=STEPS,
            guidance_rescale=0.5,
            generator=[torch.Generator(device).manual_seed(1)] if device.type == "cuda" else None,
            output_type="latent",
            callback_on_step_end=on_step,
        )
    return steps


def test_the_search_for_waits_finds_them():
    there, host = torch.zeros(3, device="meta"), torch.zeros(3)
    with Waits() as waits:
        host.to("meta", non_blocking=True)
        there * host[0] + torch.ones((), device="meta")
        assert waits.names == []
        host.to("meta")
        torch.empty_like(there).copy_(host)
        torch.tensor([0.5], device="meta")
        there[[0, 1]]
        torch.linalg.solve(torch.zeros(2, 2, device="meta"), there[:2])
    assert waits.names == ["_to_copy", "copy_", "tensor", "index by list", "solve"]
    for read in (there[0].item, lambda: bool(there[0] > 0), there.nonzero, there.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@ON_META_AND_CUDA
@pytest.mark.parametrize("name", scheduler_names())
def test_no_step_waits(name: str, device: str, drawing: Any):
    require(name)
    assert steps_made(drawing, name, TEXT) >= STEPS


@ON_META_AND_CUDA
@pytest.mark.parametrize("name", ["K_EULER", "DPMSolverMultistep", "UniPC", "SA-Solver", "DDIM", "TCD"])
def test_no_step_of_inpainting_waits(name: str, device: str, drawing: Any):
    """Inpainting adds noise at every step: by a sampler's levels, or by its table of alphas."""
    assert steps_made(drawing, name, INPAINT) == STEPS - 1


def test_the_unet_itself_does_not_wait_for_a_timestep_that_is_there(pipelines: dict[str, Any]):
    unet = on(pipelines, "meta").unet
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    with torch.device("meta"):
        latents, timestep = torch.zeros(1, 4, 8, 8), torch.tensor(1.0)
        states = torch.zeros(1, 77, unet.config.cross_attention_dim)
        more = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    with no_waits("meta"):
        unet(latents, timestep, states, added_cond_kwargs=more)


@ON_META_AND_CUDA
def test_what_the_worker_does_at_a_step_does_not_wait_either(device: str, pipelines: dict[str, Any], monkeypatch):
    pipeline = on(pipelines, device)
    if device == "meta":
        monkeypatch.setattr(render_module._Drawing, "_generators", lambda *_: None)
    request = GenerationRequest(
        "a", width=64, height=64, num_inference_steps=4, guidance_rescale=0.5, deep_cache=2, cfg_end=0.5
    )
    shares: list[float] = []
    steps: list[int] = []
    watched = contextlib.ExitStack()

    def on_step(step: int, total: int, _latents: torch.Tensor) -> None:
        steps.append(step)
        if step == 1:
            watched.enter_context(no_waits(device))
        if step == total:
            watched.close()

    # The first thing that is read is whether the picture is finite.
    on_meta = pytest.raises(RuntimeError, match="item") if device == "meta" else contextlib.nullcontext()
    with watched, on_meta:
        render(pipeline, request, on_step=on_step, before_step=shares.append)
    assert steps == [1, 2, 3, 4]
    assert shares == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("name", ["K_EULER", "UniPC"])
def test_afterwards_the_scheduler_and_the_unet_have_their_own_methods_again(name: str, pipelines: dict[str, Any]):
    pipeline = on(pipelines, "meta")
    with samplers.applied(pipeline, GenerationRequest("a", scheduler=name)):
        scheduler = pipeline.scheduler
        assert {"set_timesteps", "step", "add_noise"} <= set(vars(scheduler))
        assert len(pipeline.unet._forward_pre_hooks) == 1
    assert not {"set_timesteps", "step", "add_noise"} & set(vars(scheduler))
    assert len(pipeline.unet._forward_pre_hooks) == 0


def test_what_is_sent_ahead_has_the_same_values():
    host = torch.arange(6.0).reshape(2, 3)
    matrix, right = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([4.0, 7.0])
    with WithoutWaiting():
        assert host.to(torch.float64).dtype == torch.float64
        assert host.to("meta", torch.float16).dtype == torch.float16
        assert host.to(device="meta").device.type == "meta"
        assert host[[1, 1]].tolist() == [[3.0, 4.0, 5.0]] * 2
        # 2x + y = 4 and x + 3y = 7.
        assert torch.linalg.solve(matrix, right).tolist() == [1.0, 2.0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", scheduler_names())
def test_pictures_are_those_of_stock_diffusers_on_the_gpu(name: str, pipelines: dict[str, Any], monkeypatch):
    require(name)
    pipeline = on(pipelines, "cuda")
    request = GenerationRequest("a lighthouse", width=64, height=64, seed=3, num_inference_steps=6, scheduler=name)
    (ahead,) = render(pipeline, request)
    monkeypatch.setattr(samplers, "on_host", lambda _pipeline: contextlib.nullcontext())
    (stock,) = render(pipeline, request)
    assert farthest(ahead, stock) <= 2
