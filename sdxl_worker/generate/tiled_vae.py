"""A VAE that encodes and decodes large pictures tile by tile, with the result of the whole picture.

diffusers' own tiling normalises each tile by itself, so that neighbours differ in tint and contrast, which it hides by
blending. Here every GroupNorm takes the mean and variance of the whole picture, gathered from all tiles before any of
them goes on, and a tile carries the margin that its convolutions reach: the result is that of untiled code, up to
rounding. Layers at the latents' own resolution, the attention among them, see the picture whole: they need little
memory. The price is time: the high resolutions are computed about four times over.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Pixels of a stage's input, whose side doubles or halves inside. Even, as the encoder's strides need it.
TILE = 384
# A stage's convolutions reach seven pixels at most: two per ResNet block, one each around them.
MARGIN = 8

# Moments of one tile's part of the picture, per picture and group: mean, variance, number of values.
_Moments = tuple[Tensor, Tensor, int]


@contextlib.contextmanager
def tiled(vae: AutoencoderKL, above: int = 0) -> Iterator[None]:
    """Inside, `vae` works tile by tile on pictures of more than `above` pixels; outside, it is as it was."""
    whole_encode, whole_decode = vae.encoder.forward, vae.decoder.forward

    def encode(sample: Tensor) -> Tensor:
        is_large = sample.shape[-2] * sample.shape[-1] > above
        return _encode(vae.encoder, sample) if is_large else whole_encode(sample)

    def decode(sample: Tensor, latent_embeds: None = None) -> Tensor:
        is_large = 64 * sample.shape[-2] * sample.shape[-1] > above
        return _decode(vae.decoder, sample) if is_large else whole_decode(sample, latent_embeds)

    with contextlib.ExitStack() as changes:
        _replace(changes, vae.encoder, encode)
        _replace(changes, vae.decoder, decode)
        yield


def _replace(changes: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let `forward` stand in for the method of that name until `changes` close."""
    before = vars(module).get("forward")
    module.forward = forward
    if before is None:
        changes.callback(delattr, module, "forward")
    else:
        changes.callback(setattr, module, "forward", before)


def _encode(encoder: Any, sample: Tensor) -> Tensor:
    """What Encoder.forward gives for pictures (n, 3, h, w): moments of latents (n, 8, h / 8, w / 8)."""
    first: list[nn.Module] = [encoder.conv_in]
    for block in encoder.down_blocks:
        layers = [*first, *block.resnets, *(block.downsamplers or ())]
        sample = _by_tiles(layers, sample) if block.downsamplers else _run(layers, sample)
        first = []
    return _run([encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out], sample)


def _decode(decoder: Any, sample: Tensor) -> Tensor:
    """What Decoder.forward gives for latents (n, 4, h, w): pictures (n, 3, 8 h, 8 w)."""
    sample = _run([decoder.conv_in, decoder.mid_block], sample)
    upsamplers: Sequence[nn.Module] = ()
    for block in decoder.up_blocks:
        layers = [*upsamplers, *block.resnets]
        if block is decoder.up_blocks[-1]:
            layers += [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
        sample = _by_tiles(layers, sample) if upsamplers else _run(layers, sample)
        upsamplers = block.upsamplers or ()
    return sample


def _run(layers: Sequence[nn.Module], sample: Tensor) -> Tensor:
    from diffusers.models.resnet import ResnetBlock2D

    for layer in layers:
        sample = layer(sample, None) if isinstance(layer, ResnetBlock2D) else layer(sample)
    return sample


def _by_tiles(layers: Sequence[nn.Module], sample: Tensor) -> Tensor:
    """The layers' result for the whole of `sample`, from tiles of it."""
    tiles = _tiles(sample.shape[-2], sample.shape[-1])
    if len(tiles) == 1:
        return _run(layers, sample)
    norms = [norm for layer in layers for norm in layer.modules() if isinstance(norm, nn.GroupNorm)]
    with contextlib.ExitStack() as changes:
        for norm in norms:
            moments = [_moments_at(norm, layers, sample, tile) for tile in tiles]
            _replace(changes, norm, functools.partial(_normalised, norm, *_pooled(moments)))
        whole: Tensor | None = None
        for tile in tiles:
            part = tile.inside(_run(layers, tile.cut(sample)))
            if whole is None:
                size = [side * part.shape[-2] // (tile.bottom - tile.top) for side in sample.shape[-2:]]
                whole = part.new_empty(*part.shape[:2], *size)
            tile.put(part, whole, sample)
    assert whole is not None
    return whole


@dataclass(frozen=True)
class _Tile:
    """A part of a picture (rows `top` to `bottom`, columns `left` to `right`) and how far the margins reach."""

    top: int
    bottom: int
    left: int
    right: int
    margins: tuple[int, int, int, int]

    def cut(self, sample: Tensor) -> Tensor:
        """The tile with its margins."""
        above, below, before, after = self.margins
        return sample[..., self.top - above : self.bottom + below, self.left - before : self.right + after]

    def inside(self, computed: Tensor) -> Tensor:
        """The tile without its margins, of what was computed from `cut` at any resolution."""
        above, below, before, after = self.margins
        height, width = self.bottom - self.top, self.right - self.left
        rows, columns = computed.shape[-2:]
        first_row, first_column = rows * above // (above + height + below), columns * before // (before + width + after)
        row_count, column_count = rows * height // (above + height + below), columns * width // (before + width + after)
        return computed[..., first_row : first_row + row_count, first_column : first_column + column_count]

    def put(self, part: Tensor, whole: Tensor, sample: Tensor) -> None:
        """Put `part` where it belongs in `whole`, which is `sample` at another resolution."""
        top, left = (
            edge * target // side
            for edge, target, side in zip((self.top, self.left), whole.shape[-2:], sample.shape[-2:], strict=True)
        )
        whole[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part


def _tiles(height: int, width: int) -> list[_Tile]:
    return [
        _Tile(top, bottom, left, right, (above, below, before, after))
        for top, bottom, above, below in _pieces(height)
        for left, right, before, after in _pieces(width)
    ]


def _pieces(side: int) -> Iterator[tuple[int, int, int, int]]:
    """Beginning and end of each piece of a side, and the margins that there is room for; all of them even."""
    count = -(-side // TILE)
    length = -(-side // (2 * count)) * 2
    for start in range(0, side, length):
        end = min(start + length, side)
        yield start, end, min(MARGIN, start), min(MARGIN, side - end)


class _Reached(Exception):
    """A norm's input, which is as far as a tile has to be computed."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__("reached")
        self.sample = sample


def _moments_at(norm: nn.GroupNorm, layers: Sequence[nn.Module], sample: Tensor, tile: _Tile) -> _Moments:
    """The moments of what `norm` is given for `tile`; the norms before it know theirs."""

    def stop(reached: Tensor) -> Tensor:
        raise _Reached(reached)

    with contextlib.ExitStack() as changes:
        _replace(changes, norm, stop)
        try:
            _run(layers, tile.cut(sample))
        except _Reached as end:
            inside = tile.inside(end.sample)
    groups = inside.float().reshape(inside.shape[0], norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    return mean.double(), variance.double(), groups.shape[2]


def _pooled(moments: Sequence[_Moments]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all tiles together, in float32."""
    total = sum(count for _, _, count in moments)
    mean = sum((mean * (count / total) for mean, _, count in moments), torch.zeros(()))
    variance = sum(
        ((variance + (part - mean) ** 2) * (count / total) for part, variance, count in moments), torch.zeros(())
    )
    return mean.float(), variance.float()


def _normalised(norm: nn.GroupNorm, mean: Tensor, variance: Tensor, sample: Tensor) -> Tensor:
    """What `norm` gives when its groups have this mean and variance."""
    pictures, channels = sample.shape[:2]
    as_channels = sample.reshape(1, pictures * channels, *sample.shape[2:])
    per_group = channels // norm.num_groups
    return nn.functional.batch_norm(
        as_channels,
        mean.flatten().repeat_interleave(per_group),
        variance.flatten().repeat_interleave(per_group),
        norm.weight.float().repeat(pictures),
        norm.bias.float().repeat(pictures),
        eps=norm.eps,
    ).reshape(sample.shape)
