"""PREVIEW_VAE_ID: a small VAE that draws the previews and nothing else."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.generate.preview_vae import load_preview_vae
from sdxl_worker.generate.previews import Previews
from sdxl_worker.job_run import Denoising, NoProgress, ProgressEvent
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

ON_CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny of taesdxl's structure, narrower, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    path = tmp_path_factory.mktemp("preview") / "taesdxl"
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(folder: Path) -> Any:
    return diffusers.AutoencoderTiny.from_pretrained(folder).requires_grad_(False)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_it_is_loaded_for_the_pipeline_s_device_and_dtype(folder: Path, pipeline: Any):
    loaded = load_preview_vae(Settings(preview_vae_id=str(folder)), pipeline)
    assert loaded is not None
    assert type(loaded) is diffusers.AutoencoderTiny
    assert (loaded.device, loaded.dtype) == (pipeline.device, pipeline.unet.dtype)
    assert not [weight for weight in loaded.parameters() if weight.requires_grad]
    assert load_preview_vae(Settings(), pipeline) is None


def test_anything_else_is_refused_by_name(tmp_path: Path, pipeline: Any):
    pipeline.vae.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.safetensors").write_bytes(b"")
    diffusers.AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "flux")
    for name in ("other", "empty", "one.safetensors", "flux", "missing.ckpt"):
        with pytest.raises(ModelUnavailable, match="PREVIEW_VAE_ID"):
            load_preview_vae(Settings(preview_vae_id=str(tmp_path / name)), pipeline)


@ON_CPU_AND_CUDA
def test_a_preview_is_what_diffusers_decodes(device: str, vae: Any):
    latents = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(1)).expand(2, 4, 8, 16)
    (expected,) = VaeImageProcessor().postprocess(vae.decode(latents[:1]).sample, "pil")
    picture = opened(Previews(vae.to(device)).begin(latents.to(device))())
    vae.to("cpu")
    assert (picture.format, picture.size) == ("JPEG", (128, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 4


@ON_CPU_AND_CUDA
@pytest.mark.parametrize(("sides", "size"), [((96, 128), (512, 384)), ((128, 256), (512, 256))])
def test_a_large_picture_is_shown_small(
    device: str, sides: tuple[int, int], size: tuple[int, int], vae: Any, monkeypatch
):
    decode = mock.Mock(wraps=vae.decode)
    monkeypatch.setattr(vae, "decode", decode)
    picture = opened(Previews(vae.to(device)).begin(torch.zeros(1, 4, *sides, device=device))())
    vae.to("cpu")
    assert picture.size[0] == size[0]
    assert abs(picture.size[1] - size[1]) <= 4
    # Latents of 1024 x 1024.
    assert decode.call_args.args[0][0, 0].numel() <= 128 * 128


@pytest.mark.gpu
def test_the_run_does_not_wait_for_a_preview_to_begin(vae: Any):
    latents = torch.zeros(1, 4, 8, 8, device="cuda")
    previews = Previews(vae.to("cuda"))
    previews.begin(latents)()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish = previews.begin(latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opened(finish()).size == (64, 64)
    vae.to("cpu")


class _Shown(NoProgress):
    def __init__(self) -> None:
        self.previews: list[Image.Image] = []

    def update(self, event: ProgressEvent) -> None:
        if isinstance(event, Denoising) and event.preview is not None:
            self.previews.append(opened(event.preview()()))


def test_a_job_s_picture_has_the_same_bits_with_previews_and_without(folder: Path, tmp_path: Path):
    worker = Worker(Settings(model_id="tiny", preview_vae_id=str(folder), lora_cache_dir=tmp_path))
    answers, shown = [], _Shown()
    worker.get_ready()
    for preview in (False, True):
        fields = {"prompt": "a", "seed": 5, "width": 64, "height": 128, "num_inference_steps": 2, "preview": preview}
        run = worker.start_run({})
        run.progress = shown
        answers.append(worker.run({"input": fields}, run))
    assert answers[0] == answers[1]
    # The VAE's eight pixels for each latent.
    assert [picture.size for picture in shown.previews] == [(64, 128)] * 2
