"""The README names the fields, defaults, variables, codes and commands that the code has."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save

import download_weights
import schemas
from sdxl_worker import kinds
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.sources import parse_reference
from sdxl_worker.assets.sources.civitai import CivitaiReference
from sdxl_worker.assets.sources.hub import HubReference
from sdxl_worker.assets.sources.local import CachedReference
from sdxl_worker.assets.sources.url import UrlReference
from sdxl_worker.errors import AssetFileError, FetchError, WorkerError
from sdxl_worker.few_step import FEW_STEP, recognised
from sdxl_worker.request import fields as request
from sdxl_worker.request import work
from sdxl_worker.request.lora_entries import parse_lora_entries
from sdxl_worker.request.sampler_names import Named, find_scheduler
from sdxl_worker.request.second_pass import MAX_FINAL_PIXELS, Hires
from sdxl_worker.schedulers import SCHEDULERS, schedule_names, scheduler_names
from sdxl_worker.settings import Settings
from tests.support.readme import README, ROOT, readme_table, unquoted


def setting_defaults() -> dict[str, Any]:
    return {entry.metadata["name"]: entry.default for entry in fields(Settings)}


def error_classes(base: type[WorkerError] = WorkerError) -> Iterator[type[WorkerError]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__ == WorkerError.__module__:
            yield from error_classes(child)


def public_codes() -> dict[str, type[WorkerError]]:
    """What a caller can see: the classes' codes, and those that a kind of asset has instead."""
    there = [kind for kind in vars(kinds).values() if isinstance(kind, Kind)]
    codes = {}
    for error in error_classes():
        of_a_file = issubclass(error, FetchError | AssetFileError)
        for code in {kind.codes.get(error, error.code) for kind in there} if of_a_file else {error.code}:
            codes[code] = error
    return codes


def test_request_table_names_the_fields_and_defaults_of_the_schema() -> None:
    rows = readme_table("Request", "Field")
    assert [unquoted(row["Field"]) for row in rows] == list(schemas.INPUT_SCHEMA)
    for row in rows:
        name, field = unquoted(row["Field"]), schemas.INPUT_SCHEMA[unquoted(row["Field"])]
        assert (row["Default"] == "required") == field["required"], name
        if not field["required"]:
            assert json.loads(unquoted(row["Default"])) == field["default"], name


def test_request_table_names_the_types() -> None:
    words = {str: "string", int: "integer", dict: "object", float: "number", list: "list", bool: "boolean"}
    for row in readme_table("Request", "Field"):
        name = unquoted(row["Field"])
        word, _, null = row["Type"].partition(" or ")
        assert word == words[schemas.INPUT_SCHEMA[name]["type"]], name
        assert (request.FIELDS[name].check(None) is None) == (null == "null"), name


@pytest.mark.parametrize("row", readme_table("Request", "Field"), ids=lambda row: unquoted(row["Field"]))
def test_ranges_of_the_request_table_are_the_accepted_ones(row: dict[str, str]) -> None:
    check, span = request.FIELDS[unquoted(row["Field"])].check, row["Range"]
    for good, bad in boundaries(span):
        assert check(good) is None
        assert check(bad) is not None


def test_the_table_of_hires_has_its_keys_ranges_and_defaults() -> None:
    rows = {unquoted(row["In `hires`"]): row for row in readme_table("Hires fix", "In `hires`")}
    check = request.FIELDS["hires"].check
    assert list(rows) == list(check.parts)
    for name, row in rows.items():
        assert json.loads(unquoted(row["Default"])) == getattr(Hires(), name)
        for good, bad in boundaries(row["Range"]):
            assert check({name: good}) is None
            assert check({name: bad}) is not None
    assert f"At most {MAX_FINAL_PIXELS} pixels" in rows["scale"]["Meaning"]


def test_samplers_are_listed_with_what_holds_for_them() -> None:
    rows = readme_table("Samplers", "Name")
    assert tuple(unquoted(row["Name"]) for row in rows) == scheduler_names()
    for row in rows:
        scheduler = SCHEDULERS[unquoted(row["Name"])]
        names = re.findall(r"`([^`]+)`", row["Other names"])
        assert [find_scheduler(name) for name in names] == [Named(scheduler)] * len(names)
        assert {scheduler.display_name, *scheduler.other_names} <= {scheduler.name, *names}
        assert row["Steps"] == f"{scheduler.min_steps} to {scheduler.max_steps or request.MAX_STEPS}"
        calls = {"n": 7, "n + 1": 8, "2n - 1": 13}[row["Calls of the UNet in n steps"]]
        assert scheduler.calls(7) == calls
        cell, listed = row["`schedule_type`"], set(re.findall(r"`(\w+)`", row["`schedule_type`"]))
        assert {"automatic", *scheduler.schedules} == (
            set(schedule_names()) - listed if cell.startswith("all") else listed
        ), scheduler.name
        takes = {"`timesteps`": scheduler.timesteps, "`eta`": scheduler.eta is not None, "zero SNR": scheduler.zero_snr}
        assert row["Also takes"] == ", ".join(name for name, taken in takes.items() if taken)


def test_few_step_loras_are_listed_with_their_settings() -> None:
    rows = readme_table("Few-step LoRAs", "LoRA")
    assert len(rows) == len(FEW_STEP)
    for row, kind in zip(rows, FEW_STEP, strict=True):
        assert row["LoRA"] == f"[{kind.name}]({kind.source})"
        (reference,) = json.loads(unquoted(row["`loras`"]))
        assert recognised([reference]) is kind
        parse_reference(reference, Settings(), kinds.LORA)
        sampler, schedule = [*re.findall(r"`(\w+)`", row["Sampler"]), None][:2]
        assert (sampler, schedule) == (kind.settings["scheduler"], kind.settings.get("schedule_type"))
        for cell, name, bounds in (
            ("Steps", "num_inference_steps", kind.steps),
            ("Guidance", "guidance_scale", kind.guidance),
        ):
            numbers = [float(number) for number in re.findall(r"[\d.]+", row[cell])]
            assert numbers == [kind.settings[name], *(() if bounds[0] == bounds[1] else bounds)]
        beside = {name: kind.settings[name] for name in ("eta", "timesteps") if name in kind.settings}
        names, numbers = re.findall(r"`(\w+)`", row["Beside these"]), re.findall(r" ([\d.]+)", row["Beside these"])
        assert names == list(beside)
        values = [value if isinstance(value, tuple) else (value,) for value in beside.values()]
        assert [float(number) for number in numbers] == [number for value in values for number in value]


def test_environment_table_names_the_settings_and_defaults() -> None:
    rows = {
        unquoted(row["Variable"]): unquoted(row["Default"]) for row in readme_table("Environment variables", "Variable")
    }
    assert rows == {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in setting_defaults().items()
    }


def test_errors_table_names_every_code() -> None:
    rows = {unquoted(row["Code"]): row for row in readme_table("Errors", "Code")}
    codes = public_codes()
    assert set(rows) == set(codes)
    for code, error in codes.items():
        assert (rows[code]["Who acts"] == "caller") == error.caller_at_fault, code
        assert ("refresh_worker" in rows[code]["Meaning"]) == error.refresh_worker, code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"<!doctype html><title>Log in</title>", "NOT_A_LORA"),
        (b"just a text, long enough to have a length in front", "BAD_FILE"),
        (save({"model.diffusion_model.input_blocks.0.0.weight": numpy.zeros((4, 4))}), "LORA_INCOMPATIBLE"),
        (save({"clip_l": numpy.zeros((1, 768)), "clip_g": numpy.zeros((1, 1280))}), "LORA_INCOMPATIBLE"),
    ],
    ids=["web page", "text", "checkpoint", "embedding"],
)
def test_what_is_not_a_lora_has_the_code_of_its_row(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    assert kinds.LORA.check is not None
    with pytest.raises(WorkerError) as failure, kinds.LORA.own_codes():
        kinds.LORA.check(path)
    assert failure.value.code == code


def test_each_example_reference_has_the_form_of_its_row() -> None:
    forms = [
        type(parse_reference(unquoted(row["Example"]), Settings(), kinds.LORA))
        for row in readme_table("LoRA references", "Form")
    ]
    assert forms == [UrlReference, *[HubReference] * 6, *[CivitaiReference] * 4, *[CachedReference] * 3]


def test_each_example_scale_is_read() -> None:
    for row in readme_table("LoRA scales", "Scale"):
        for text in re.findall(r"`([^`]+)`", row["Scale"]):
            specs, warnings = parse_lora_entries([{"path": "a", "scale": json.loads(text)}])
            assert [spec.scale.as_json() for spec in specs] == [json.loads(text)]
            assert warnings == ()


def test_the_curl_example_is_a_valid_request() -> None:
    (body,) = re.findall(r"^  -d '(.*?)'$", README, flags=re.MULTILINE | re.DOTALL)
    assert schemas.validate_request(json.loads(body)["input"]).warnings == ()


def test_the_python_example_compiles() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    compile(code, "README.md", "exec")


def test_options_of_the_cache_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        download_weights.main(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = set(re.findall(r"--\w+", README.split("## Operate the cache")[1].split("\n## ")[0]))
    assert used == known - {"--help"}


def test_what_is_left_out_of_a_request_of_worker_sdxl() -> None:
    """The original's defaults are those of its schemas.py; ours are the code's."""
    original = {"scheduler": "DDIM", "num_inference_steps": 25, "guidance_scale": 7.5}
    rows = {
        unquoted(row["What"].removesuffix(" left out")): row for row in readme_table("Coming from worker-sdxl", "What")
    }
    for name, value in original.items():
        assert unquoted(rows[name]["worker-sdxl"]) == str(value)
        assert unquoted(rows[name]["This worker"]) == str(schemas.INPUT_SCHEMA[name]["default"])
    example = json.loads((ROOT / "examples" / "worker_sdxl.json").read_text())["input"]
    assert original.items() <= example.items()
    assert schemas.validate_request({"prompt": "a"}).denoising_strength == float(rows["strength"]["worker-sdxl"])


def test_limits_are_those_of_the_schema() -> None:
    limits = {row["What"]: row["Limit"] for row in readme_table("Limits", "What")}
    assert f"{request.MIN_SIDE} to {request.MAX_SIDE}" in limits["Picture"]
    assert str(work.MAX_PIXEL_CALLS) in limits["Work"]
    assert str(request.MAX_PROMPT_CHARACTERS) in limits["Prompts"]
    assert limits["LoRAs"].startswith(f"{request.MAX_LORAS} per request")


def test_paths_of_the_tree_table_exist() -> None:
    for row in readme_table("Where things live", "Path"):
        assert (ROOT / unquoted(row["Path"])).exists(), row["Path"]


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    assert [link for link in links if not (ROOT / link).exists()] == []


def boundaries(span: str) -> list[tuple[Any, Any]]:
    """(accepted, refused) pairs of values for a cell of the README's Range column."""
    if match := re.fullmatch(r"at most (\d+) characters", span):
        return [("x" * int(match[1]), "x" * (int(match[1]) + 1))]
    if match := re.fullmatch(r"at most (\d+) entries", span):
        return [(["a"] * int(match[1]), ["a"] * (int(match[1]) + 1))]
    if match := re.fullmatch(r"1 to (\d+) entries like `(\w+)`", span):
        good, bad = {"prompt": ("x", 3), "seed": (7, -2)}[match[2]]
        return [([good], []), ([good] * int(match[1]), [good] * (int(match[1]) + 1)), ([good], [bad])]
    if match := re.fullmatch(r"(above )?(-?\d+) to (\d+)(?:, multiple of (\d+))?", span):
        low, high, step = int(match[2]), int(match[3]), int(match[4] or 1)
        first = (low + 0.01, low) if match[1] else (low, low - step)
        return [first, (high, high + step), *([(low + step, low + 1)] if step > 1 else [])]
    if span == "`left`, `top`, `right`, `bottom`":
        return [({name: 8}, {name: 4}) for name in re.findall(r"\w+", span)] + [({}, {"above": 8})]
    if span == "an http or https URL, or a data URI":
        pairs = [("https://example.com/a.png", "ftp://example.com/a.png")]
        return [*pairs, ("data:image/png;base64,AAAA", "data:image/png,AAAA")]
    if span == "1 to 200 falling whole numbers from 999 to 0":
        most = list(range(999, 799, -1))
        return [([999], []), ([0], [-1]), (most, [*most, 0]), ([999, 0], [1000, 0]), ([5, 4], [5, 5])]
    if span == "the name of a sampler":
        return [(name, f"{name}x") for name in ("K_EULER", "Euler a", "dpmpp_2m", "DPM++ 2M SDE Karras")]
    if span.startswith("[see below]"):
        return [({}, {"x": 1}), ({}, [])]
    names = [json.loads(name) if name in ("true", "false") else name for name in re.findall(r"`([^`]+)`", span)]
    assert names, f"no rule for {span!r}"
    return [(name, f"{name}x") for name in names]
