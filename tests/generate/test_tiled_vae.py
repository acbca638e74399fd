"""The tiled VAE against the same VAE without tiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_worker.generate import tiled_vae, vae
from sdxl_worker.generate.tiled_vae import tiled
from sdxl_worker.topology import NARROW, _vae


def built() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _vae(NARROW).eval().requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def narrow():
    """A VAE of SDXL's structure at an eighth of the width."""
    return built()


@pytest.mark.parametrize(("height", "width"), [(24, 24), (13, 40)])
def test_it_decodes_what_the_whole_vae_decodes(height: int, width: int, narrow, monkeypatch):
    latents = noise(1, 4, height, width)
    whole = narrow.decode(latents).sample
    monkeypatch.setattr(tiled_vae, "TILE", 32)
    with tiled(narrow):
        tiles = narrow.decode(latents).sample
    # 1 of 255 is 0.0078 here: values lie between -1 and 1.
    assert (tiles - whole).abs().max() < 1e-4
    assert whole.std() > 0.1


@pytest.mark.parametrize(("height", "width"), [(136, 136), (104, 248)])
def test_it_encodes_what_the_whole_vae_encodes(height: int, width: int, narrow, monkeypatch):
    pictures = noise(1, 3, height, width).clamp(-1, 1)
    whole = narrow.encode(pictures).latent_dist.parameters
    monkeypatch.setattr(tiled_vae, "TILE", 40)
    with tiled(narrow):
        tiles = narrow.encode(pictures).latent_dist.parameters
    assert (tiles - whole).abs().max() < 1e-4
    assert whole.std() > 0.1


def test_pictures_of_a_batch_keep_their_own_statistics(narrow, monkeypatch):
    latents = torch.cat([noise(1, 4, 16, 16), 3 + noise(1, 4, 16, 16)])
    whole = narrow.decode(latents).sample
    monkeypatch.setattr(tiled_vae, "TILE", 24)
    with tiled(narrow):
        assert (narrow.decode(latents).sample - whole).abs().max() < 1e-4


def test_diffusers_own_tiles_would_show(narrow):
    latents = noise(1, 4, 24, 24)
    whole = narrow.decode(latents).sample
    narrow.tile_latent_min_size, narrow.tile_sample_min_size = 16, 128
    narrow.enable_tiling()
    try:
        assert (narrow.decode(latents).sample - whole).abs().mean() > 10 / 255
    finally:
        narrow.disable_tiling()


def test_half_precision_keeps_its_type_and_is_as_near_as_it_can_be(monkeypatch):
    half = built().to(torch.bfloat16)
    latents = noise(1, 4, 16, 16).bfloat16()
    whole = half.decode(latents).sample
    monkeypatch.setattr(tiled_vae, "TILE", 32)
    with tiled(half):
        tiles = half.decode(latents).sample
    assert tiles.dtype == torch.bfloat16
    assert (tiles - whole).abs().mean() < 4 / 255


def test_pictures_that_are_not_large_keep_their_bits(narrow, monkeypatch):
    monkeypatch.setattr(tiled_vae, "TILE", 32)
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 128 * 128)
    latents, larger = noise(1, 4, 16, 16), noise(1, 4, 16, 17)
    whole, whole_larger = narrow.decode(latents).sample, narrow.decode(larger).sample
    with vae.tiled_where_large(SimpleNamespace(vae=narrow)):
        assert torch.equal(narrow.decode(latents).sample, whole)
        assert not torch.equal(narrow.decode(larger).sample, whole_larger)


def test_what_a_request_can_ask_for_in_one_pass_is_decoded_whole():
    assert vae.MAX_WHOLE_PIXELS == 2048 * 2048


def test_afterwards_the_vae_is_as_it_was(narrow, monkeypatch):
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    monkeypatch.setattr(tiled_vae, "TILE", 32)

    def runs_out(_moments: Any) -> None:
        raise RuntimeError("out of memory, say")

    latents = noise(1, 4, 16, 16)
    with tiled(narrow):
        narrow.decode(latents)
        monkeypatch.setattr(tiled_vae, "_pooled", runs_out)
        with pytest.raises(RuntimeError, match="say"):
            narrow.decode(latents)
    assert [name for name, module in narrow.named_modules() if "forward" in vars(module)] == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
