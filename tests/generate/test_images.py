"""Pictures keep their pixels and their text."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.generate.images import MAX_INPUT_PIXELS, EncodedImage, encode, read_input_image, save_locally

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


def test_input_picture_is_turned_upright_and_made_rgb(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    picture.convert("L").save(buffer, "JPEG", exif=exif)
    read = read_input_image(buffer.getvalue())
    assert (read.mode, read.size) == ("RGB", (64, 96))


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_picture_is_the_callers_fault(data):
    with pytest.raises(InvalidRequest, match="image_url"):
        read_input_image(data)


def test_a_cut_picture_is_the_callers_fault(picture):
    with pytest.raises(InvalidRequest, match="broken"):
        read_input_image(encode(picture, 0, "").data[:2000])


def test_a_picture_bomb_is_refused_before_it_is_unpacked():
    side = int(MAX_INPUT_PIXELS**0.5) + 1
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    with pytest.raises(InvalidRequest, match="more than"):
        read_input_image(buffer.getvalue())
