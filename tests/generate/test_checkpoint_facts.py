"""What a checkpoint is, told from its header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_worker.errors import BadFile, ModelUnavailable
from sdxl_worker.generate.checkpoint_facts import read_checkpoint
from sdxl_worker.generate.load import load_pipeline
from sdxl_worker.settings import Settings

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
CLIP_L = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
CLIP_G = "conditioner.embedders.1.model.ln_final.weight"
REFINER_CLIP_G = "conditioner.embedders.0.model.ln_final.weight"
SD_1 = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
SD_2 = "cond_stage_model.model.ln_final.weight"


def write(path: Path, *names: str, channels: int = 4, metadata: dict[str, str] | None = None) -> Path:
    """A file with tensors of these names; the UNet's first convolution takes `channels`."""
    tensors = {name: np.zeros((8, channels, 3, 3), np.float16) if name == CONV_IN else np.zeros(2) for name in names}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("names", "channels", "what", "parts"),
    [
        ((CONV_IN, CLIP_L, CLIP_G, VAE), 4, "SDXL", ["UNet", "text encoders", "VAE"]),
        ((CONV_IN, CLIP_L, CLIP_G), 9, "SDXL, inpainting", ["UNet", "text encoders"]),
        ((CONV_IN, REFINER_CLIP_G, VAE), 4, "SDXL refiner", ["UNet", "text encoders", "VAE"]),
        ((CONV_IN, SD_1, VAE), 4, "Stable Diffusion 1.5", ["UNet", "text encoders", "VAE"]),
        ((CONV_IN, SD_1, VAE), 9, "Stable Diffusion 1.5, inpainting", ["UNet", "text encoders", "VAE"]),
        ((CONV_IN, SD_2, VAE), 4, "Stable Diffusion 2", ["UNet", "text encoders", "VAE"]),
    ],
)
def test_which_model(names, channels: int, what: str, parts: list[str], tmp_path: Path):
    facts = read_checkpoint(write(tmp_path / "a.safetensors", *names, channels=channels)).as_json()
    assert facts == {
        "is": what,
        "in_channels": channels,
        "prediction": "epsilon",
        "zero_terminal_snr": False,
        "said_by": "nothing in the file",
        "parts": parts,
        "tensors": len(names),
        "dtype": "float16",
    }


@pytest.mark.parametrize(
    "name", ["lora_unet_input_blocks_1_1_proj_in.lora_down.weight", "decoder.conv_in.weight", "a", "v_pred"]
)
def test_what_is_not_a_checkpoint(name: str, tmp_path: Path):
    facts = read_checkpoint(write(tmp_path / "a.safetensors", name)).as_json()
    assert facts == {"is": "not a checkpoint", "tensors": 1, "dtype": "float64"}


def test_a_part_of_a_checkpoint_is_named(tmp_path: Path):
    facts = read_checkpoint(write(tmp_path / "a.safetensors", VAE, "first_stage_model.a")).as_json()
    assert facts == {"is": "not a checkpoint", "parts": ["VAE"], "tensors": 2, "dtype": "float64"}


def test_what_is_not_safetensors_is_an_error(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04" * 9)
    with pytest.raises(BadFile, match="pickle"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "channels", "sentence"),
    [
        ((CONV_IN, REFINER_CLIP_G), 4, "it is a checkpoint of SDXL refiner, and this worker runs SDXL"),
        ((CONV_IN, SD_1), 4, r"it is a checkpoint of Stable Diffusion 1\.5, and this worker runs SDXL"),
        ((CONV_IN, CLIP_G), 8, "its UNet takes 8 channels, not 4 or 9"),
    ],
)
def test_another_model_is_refused_by_name_before_it_is_loaded(names, channels, sentence, tmp_path: Path):
    path = write(tmp_path / "model.safetensors", *names, channels=channels)
    with pytest.raises(ModelUnavailable, match=rf"model\.safetensors cannot be loaded: {sentence}"):
        load_pipeline(Settings(model_id=str(path), lora_cache_dir=tmp_path))


def test_a_file_that_is_cut_off_says_so(tmp_path: Path):
    path = write(tmp_path / "model.safetensors", CONV_IN, CLIP_G)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelUnavailable, match="it is cut off or padded; check MODEL_ID"):
        load_pipeline(Settings(model_id=str(path), lora_cache_dir=tmp_path))
