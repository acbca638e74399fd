"""A random SDXL refiner with the real structure, for `REFINER_ID=tiny` and the tests: nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_worker.topology import SCHEDULER_CONFIG, default_dtype

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline


def build_refiner(base: StableDiffusionXLPipeline, *, seed: int = 1) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner on the text encoder 2, tokenizer 2 and VAE of `base`, of its size TINY.

    Its UNet has stabilityai/stable-diffusion-xl-refiner-1.0's four levels, of which the two in the middle attend, one
    text encoder's width, and an aesthetic score among the time ids. In the dtype of the base model's UNet, on the CPU.
    The same bits for the same arguments; global RNG untouched.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

    text = base.text_encoder_2.config
    with torch.random.fork_rng(devices=[]), default_dtype(base.unet.dtype):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=1,
            attention_head_dim=[2, 4, 4, 4],
            cross_attention_dim=text.hidden_size,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=5 * 8 + text.projection_dim,
            norm_num_groups=4,
        )
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
