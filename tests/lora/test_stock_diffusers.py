"""The README's tables of formats and key styles: what stock diffusers makes of the files that this worker applies.

That this worker applies them is shown in test_formats.py and test_keys.py, on the same files.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from tests.support.lora_files import FORMATS, picture, save, whole_unet
from tests.support.lora_styles import STYLES, merged_by_hand, styled_file
from tests.support.readme import readme_table

WORKER = "This worker"
STOCK = "Stock diffusers 0.42.1"
FORMAT_ROWS = {row["Format"]: row for row in readme_table("LoRA formats", "Format")}
STYLE_ROWS = {row["Key style"]: row for row in readme_table("LoRA formats", "Key style")}


def _stock(pipeline, path: Path, expected: np.ndarray) -> str:
    """`yes` when stock loading renders the expected picture; else what happens instead."""
    stock = copy.deepcopy(pipeline)
    try:
        stock.load_lora_weights(str(path.parent), weight_name=path.name)
    except Exception:  # whatever it raises is the finding
        return "error"
    actual = picture(stock)
    if np.abs(actual - expected).max() <= 1:
        return "yes"
    return "ignored" if np.abs(actual - picture(pipeline)).max() <= 1 else "wrong picture"


def test_the_tables_list_what_is_tested():
    assert FORMAT_ROWS.keys() == FORMATS.keys()
    assert STYLE_ROWS.keys() == STYLES.keys()
    assert {row[WORKER] for row in (*FORMAT_ROWS.values(), *STYLE_ROWS.values())} == {"yes"}


@pytest.mark.parametrize("name", FORMATS)
def test_format_cell(name: str, pipeline, tmp_path: Path):
    tensors, changes = whole_unet(pipeline.unet, name)
    merged = merged_by_hand(pipeline, [])
    for module, change in changes.items():
        merged.unet.get_parameter(f"{module}.weight").data.add_(change)
    path = save(tmp_path / "lora.safetensors", tensors)
    assert _stock(pipeline, path, picture(merged)) == FORMAT_ROWS[name][STOCK]


@pytest.mark.parametrize("style", STYLES)
def test_key_style_cell(style: str, pipeline, tmp_path: Path):
    tensors, changes = styled_file(pipeline, style)
    path = save(tmp_path / "lora.safetensors", tensors)
    assert _stock(pipeline, path, picture(merged_by_hand(pipeline, [(changes, 1.0)]))) == STYLE_ROWS[style][STOCK]
