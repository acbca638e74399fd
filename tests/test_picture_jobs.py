"""Jobs that bring their picture and mask along, through a Worker."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.job_run import Denoising, ProgressEvent
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from sdxl_worker.worker import Worker
from tests.support.hostile_pictures import saved
from tests.support.lora_files import weight_hash

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
MASK = Image.new("L", (120, 80), 0)
MASK.paste(255, (30, 20, 70, 60))


def data_uri(image: Image.Image, format_name: str = "PNG", **options: Any) -> str:
    encoded = base64.b64encode(saved(image, format_name, **options)).decode()
    return f"data:image/{format_name.lower()};base64,{encoded}"


SMALL = {"prompt": "a (lighthouse:1.3)", "prompt_syntax": "a1111", "num_inference_steps": 4, "seed": 5}
INPAINT = {**SMALL, "width": 120, "height": 80, "image": data_uri(PICTURE), "mask": data_uri(MASK)}


@pytest.fixture
def worker(pipeline, engine, tmp_path, monkeypatch) -> Worker:
    worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(worker.settings.lora_cache_dir)
    worker.resident.use(pipeline)
    monkeypatch.setattr(worker, "engine_of", lambda _: engine)
    return worker


def pictures(answer: dict[str, Any]) -> list[Image.Image]:
    assert "images" in answer, answer
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in answer["images"]]


def test_what_is_not_masked_arrives_bit_for_bit_and_weights_are_put_back(worker):
    before = weight_hash(worker.pipeline)
    answer = worker.run({"input": {**INPAINT, "loras": ["tiny-example"], "num_images": 3}})
    assert "warnings" not in answer
    # Beyond the reach of a blur of 4.
    kept = np.ones((80, 120), bool)
    kept[4:76, 14:86] = False
    for picture in pictures(answer):
        assert np.array_equal(np.asarray(picture)[kept], np.asarray(PICTURE)[kept])
        assert np.abs(np.asarray(picture)[30:50, 40:60].astype(int) - np.asarray(PICTURE)[30:50, 40:60]).mean() > 5
        assert "Denoising strength: 0.75, Mask blur: 4" in picture.info["parameters"]
        assert "<lora:tiny-example:1>" in picture.info["parameters"]
    assert weight_hash(worker.pipeline) == before


def test_a_stop_puts_the_weights_back(worker):
    before = weight_hash(worker.pipeline)
    run = worker.start_run({"id": "stopped"})
    seen: list[tuple[int, int]] = []

    class Stop:
        def update(self, event: ProgressEvent) -> None:
            if isinstance(event, Denoising):
                seen.append((event.step, event.steps))
                run.cancel()

        def close(self) -> None:
            pass

    run.progress = Stop()
    answer = worker.run({"input": {**INPAINT, "loras": ["tiny-example"], "num_inference_steps": 40}}, run)
    assert answer["error"].startswith("CANCELLED: ")
    assert seen == [(1, 30)]
    assert weight_hash(worker.pipeline) == before
    assert len(pictures(worker.run({"input": INPAINT}))) == 1


def test_a_rotated_photograph_and_its_mask_lie_over_each_other(worker):
    """EXIF says that both have to be turned; the mask is half as large."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = PICTURE.transpose(Image.Transpose.ROTATE_90)
    small = MASK.resize((60, 40), Image.Resampling.NEAREST).transpose(Image.Transpose.ROTATE_90)
    fields = {"image": data_uri(turned, exif=exif), "mask": data_uri(small, exif=exif)}
    (picture,) = pictures(worker.run({"input": {**INPAINT, **fields, "mask_blur": 0}}))
    outside = np.asarray(MASK) == 0
    outside[18:62, 28:72] = False
    assert np.array_equal(np.asarray(picture)[outside], np.asarray(PICTURE)[outside])
    assert np.abs(np.asarray(picture)[24:56, 34:66].astype(int) - np.asarray(PICTURE)[24:56, 34:66]).mean() > 5


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mask": "data:image/png;base64,QUJD"}, "mask does not lead to a picture (png, jpeg, webp, gif, bmp, tiff)"),
        ({"image": "data:image/png;base64,QUJ"}, "image is not well-formed base64"),
        ({"mask": data_uri(Image.new("L", (9, 9)))}, "mask leaves nothing to redraw: white is redrawn"),
        ({"mask": "data:image/png,QUJD"}, "mask must be a data URI in base64 (data:image/png;base64,...)"),
        ({"mask_url": "https://a/b.png"}, "mask_url and mask mean the same: give one of them"),
    ],
)
def test_what_is_wrong_with_a_picture_is_one_sentence_that_names_its_field(worker, fields, sentence: str):
    answer = worker.run({"input": {**INPAINT, **fields}})
    assert set(answer) == {"error"}
    assert answer["error"].startswith(f"INVALID_INPUT: {sentence}")
    assert json.dumps(answer).isascii()
