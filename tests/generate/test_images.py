"""Pictures keep their pixels and their text."""

import base64
import io

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdxl_worker.generate.images import EncodedImage, encode, pictures_in, save_locally

TEXT = "ein Haus, 猫, 🏠\nNegative prompt: flou\nSteps: 1, Seed: 7"


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


def opened(image: EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(image.data))


def user_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_are_rounded_as_diffusers_rounds_them(device: str):
    # Every number from 0 to 1 that half precision has, each way round of halves, and others of single precision.
    halves = torch.arange(0x3C01, dtype=torch.int16).view(torch.float16).float()
    others = torch.rand(2 * 3 * 96 * 64 - len(halves) - 255, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([halves, (torch.arange(255) + 0.5) / 255, others]).reshape(2, 3, 64, 96)
    for values in (pixels, pixels.half()):
        expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(values))
        drawn = pictures_in(values.to(device))
        assert [picture.size for picture in drawn] == [(96, 64)] * 2
        assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in expected]


def test_png_is_lossless_and_carries_any_text(picture):
    image = encode(picture, 7, TEXT)
    assert (np.asarray(opened(image)) == np.asarray(picture)).all()
    assert opened(image).info["parameters"] == TEXT
    assert (image.suffix, image.mime, image.seed) == (".png", "image/png", 7)


@pytest.mark.parametrize("format_name", ["jpeg", "webp"])
def test_other_formats_carry_the_text_in_exif(picture, format_name):
    image = encode(picture, 7, TEXT, format_name, 80)
    assert opened(image).format == format_name.upper()
    assert user_comment(opened(image)) == TEXT
    assert len(encode(picture, 7, TEXT, format_name, 20).data) < len(image.data)


@pytest.mark.parametrize(("format_name", "quality"), [("jpeg", 30), ("jpeg", 95), ("webp", 30), ("webp", 95)])
def test_the_quality_is_the_one_asked_for(picture, format_name: str, quality: int):
    by_pillow = io.BytesIO()
    picture.save(by_pillow, format_name, quality=quality, **({"method": 2} if format_name == "webp" else {}))
    expected = Image.open(io.BytesIO(by_pillow.getvalue()))
    actual = opened(encode(picture, 7, "", format_name, quality))
    assert getattr(actual, "quantization", None) == getattr(expected, "quantization", None)
    assert (np.asarray(actual) == np.asarray(expected)).all()


def test_a_text_too_long_for_exif_is_left_out(picture):
    image = opened(encode(picture, 7, "x" * 40_000, "jpeg"))
    image.load()
    assert 0x9286 not in image.getexif().get_ifd(0x8769)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_data_uri_and_its_length(size):
    image = EncodedImage(bytes(size), ".png", "image/png", 0)
    uri = image.data_uri()
    assert len(uri) == image.data_uri_length
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == bytes(size)


def test_saved_under_a_harmless_name(tmp_path, picture):
    (path,) = save_locally([encode(picture, 7, TEXT)], tmp_path / "output", "../../etc/x y")
    assert path == tmp_path / "output" / "_etc_x_y_7.png"
    assert Image.open(path).size == (96, 64)
