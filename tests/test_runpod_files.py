"""The Hub listing, its tests, the example inputs and the image say what the code says.

The rules for hub.json and tests.json are those of https://docs.runpod.io/hub/publishing-guide ("hub.json reference" and
"tests.json reference"); pool and GPU ids are those of https://docs.runpod.io/references/gpu-types.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import schemas
from sdxl_worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent

CATEGORIES = {"audio", "embedding", "language", "video", "image"}
HUB_FIELDS = {"title", "description", "type", "category", "iconUrl", "config"}
CONFIG_FIELDS = {"runsOn", "containerDiskInGb", "gpuCount", "gpuIds", "allowedCudaVersions", "env", "presets"}
# Input type -> the JSON types its default may have.
INPUT_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "huggingface": (str,),
    "number": (int, float),
    "boolean": (bool,),
}
INPUT_FIELDS = {
    "name",
    "type",
    "description",
    "default",
    "advanced",
    "options",
    "min",
    "max",
    "trueValue",
    "falseValue",
}
POOLS = {
    "AMPERE_16": ("NVIDIA RTX A4000",),
    "AMPERE_24": ("NVIDIA L4", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"),
    "ADA_24": ("NVIDIA GeForce RTX 4090",),
    "ADA_32_PRO": ("NVIDIA GeForce RTX 5090",),
    "AMPERE_48": ("NVIDIA RTX A6000", "NVIDIA A40"),
    "ADA_48_PRO": ("NVIDIA L40", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation"),
    "AMPERE_80": ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
    "ADA_80_PRO": ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"),
    "HOPPER_141": ("NVIDIA H200",),
}
# The CUDA that PyPI's Linux wheel is built for: torch 2.13.0 has "Requires-Dist: cuda-toolkit[...]==13.0.3".
TORCH_CUDA = {"2.13.0": (13, 0)}
# What RunPod's API takes for allowedCudaVersions: https://docs.runpod.io/api-reference/endpoints/POST/endpoints
LISTED_CUDA = {"13.0", "12.9", "12.8", "12.7", "12.6", "12.5", "12.4", "12.3", "12.2", "12.1", "12.0", "11.8"}
# Variables of the listing that RunPod reads itself.
PLATFORM_VARIABLES = {"RUNPOD_INIT_TIMEOUT"}
# RunPod sets every variable of the form, and to set VAE_ID is to want it for local model folders too.
NOT_IN_THE_FORM = {"VAE_ID"}


def load(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


HUB = load(".runpod/hub.json")
CONFIG = HUB["config"]
INPUTS: dict[str, dict[str, Any]] = {entry["key"]: entry.get("input", {}) for entry in CONFIG["env"]}
TESTS = load(".runpod/tests.json")
REQUESTS = {case["name"]: case["input"] for case in TESTS["tests"]} | {
    name: load(name)["input"] for name in ("test_input.json", "test_input_with_lora.json")
}


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def setting_defaults() -> dict[str, Any]:
    return {entry.metadata["name"]: entry.default for entry in fields(Settings)}


class TestHubListing:
    def test_has_the_required_fields_and_no_unknown_ones(self) -> None:
        assert set(HUB) <= HUB_FIELDS
        assert HUB["type"] == "serverless"
        assert HUB["category"] in CATEGORIES
        assert all(isinstance(HUB[name], str) and HUB[name].strip() for name in ("title", "description"))
        assert urlsplit(HUB["iconUrl"]).scheme == "https"

    def test_config_names_a_gpu_machine(self) -> None:
        assert set(CONFIG) <= CONFIG_FIELDS
        assert CONFIG["runsOn"] == "GPU"
        assert type(CONFIG["containerDiskInGb"]) is int
        assert CONFIG["gpuCount"] == 1
        assert set(CONFIG["gpuIds"].split(",")) <= set(POOLS)

    @pytest.mark.parametrize("entry", CONFIG["env"], ids=lambda entry: entry["key"])
    def test_each_variable_is_a_documented_input(self, entry: dict[str, Any]) -> None:
        assert set(entry) == {"key", "input"}
        field = entry["input"]
        assert {"name", "type", "description", "default"} <= set(field) <= INPUT_FIELDS
        assert type(field["default"]) in INPUT_TYPES[field["type"]]
        if field["type"] == "number":
            assert field.get("min", field["default"]) <= field["default"] <= field.get("max", field["default"])
        if "options" in field:
            assert field["default"] in [option["value"] for option in field["options"]]

    def test_no_variable_is_named_twice(self) -> None:
        assert len(INPUTS) == len(CONFIG["env"])

    def test_two_presets_or_more_that_set_known_variables(self) -> None:
        presets = CONFIG["presets"]
        assert len(presets) >= 2
        assert len({preset["name"] for preset in presets}) == len(presets)
        for preset in presets:
            assert set(preset) == {"name", "defaults"}
            for key, value in preset["defaults"].items():
                field = INPUTS[key]
                assert type(value) in INPUT_TYPES[field["type"]]
                if field["type"] == "number":
                    assert field.get("min", value) <= value <= field.get("max", value)

    def test_variables_and_defaults_are_those_of_settings(self) -> None:
        ours = {key: field["default"] for key, field in INPUTS.items() if key not in PLATFORM_VARIABLES}
        theirs = {name: str(value) if isinstance(value, Path) else value for name, value in setting_defaults().items()}
        assert ours == {name: value for name, value in theirs.items() if name not in NOT_IN_THE_FORM}
        assert set(INPUTS) - set(ours) == PLATFORM_VARIABLES

    def test_the_listing_is_read_back_as_the_default_settings(self) -> None:
        """RunPod sets every variable of the form, also the ones that the user left alone."""
        assert Settings.from_environment({key: str(field["default"]) for key, field in INPUTS.items()}) == Settings()

    def test_bounds_of_the_form_are_accepted(self) -> None:
        for key, field in INPUTS.items():
            for bound in ("min", "max"):
                if bound in field and key not in PLATFORM_VARIABLES:
                    Settings.from_environment({key: str(field[bound])})

    @pytest.mark.parametrize("preset", CONFIG["presets"], ids=lambda preset: preset["name"])
    def test_presets_are_settings_that_can_be_read(self, preset: dict[str, Any]) -> None:
        environment = {key: str(value) for key, value in preset["defaults"].items()}
        assert Settings.from_environment(environment).model_id == preset["defaults"]["MODEL_ID"]


class TestHubTests:
    def test_have_the_documented_form(self) -> None:
        assert set(TESTS) == {"tests", "config"}
        for case in TESTS["tests"]:
            assert set(case) <= {"name", "input", "timeout"}
            assert isinstance(case["name"], str)
            assert isinstance(case["input"], dict)
            assert type(case["timeout"]) is int
            assert case["timeout"] >= 60_000, "milliseconds, and the first job includes loading the model"
        assert set(TESTS["config"]) <= {"gpuTypeId", "gpuCount", "env", "allowedCudaVersions"}
        assert TESTS["config"]["gpuCount"] == CONFIG["gpuCount"]

    def test_run_on_a_gpu_that_the_listing_offers(self) -> None:
        offered = [gpu for pool in CONFIG["gpuIds"].split(",") for gpu in POOLS[pool]]
        assert TESTS["config"]["gpuTypeId"] in offered

    def test_hold_a_plain_and_a_lora_case(self) -> None:
        with_loras = [bool(case["input"].get("loras")) for case in TESTS["tests"]]
        assert True in with_loras
        assert False in with_loras

    @pytest.mark.parametrize("name", REQUESTS)
    def test_requests_are_valid_and_name_only_what_has_an_effect(self, name: str) -> None:
        request = schemas.validate_request(REQUESTS[name])
        assert request.warnings == ()
        assert len(request.loras) == len(REQUESTS[name].get("loras", []))

    def test_the_lora_example_is_the_public_offset_lora(self) -> None:
        (spec,) = schemas.validate_request(REQUESTS["test_input_with_lora.json"]).loras
        assert spec.reference.endswith(
            "/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_offset_example-lora_1.0.safetensors"
        )
        assert spec.scale.as_json() == 0.8


class TestCuda:
    """Image, driver check and hosts agree with the CUDA that the pinned torch is built for.

    A program built for CUDA x.y runs on drivers of the x family from its first release on:
    https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
    """

    def torch_cuda(self) -> tuple[int, int]:
        (pin,) = re.findall(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
        return TORCH_CUDA[pin]

    def test_hosts_have_a_driver_for_the_pinned_torch(self) -> None:
        allowed = [version(text) for text in CONFIG["allowedCudaVersions"]]
        assert allowed == sorted(set(allowed), reverse=True)
        assert all(host >= self.torch_cuda() for host in allowed)
        assert self.torch_cuda() in allowed

    def test_versions_are_those_that_runpod_lists(self) -> None:
        """All of them that are new enough: a version it does not know would refuse the listing."""
        enough = {text for text in LISTED_CUDA if version(text) >= self.torch_cuda()}
        assert set(CONFIG["allowedCudaVersions"]) == enough

    def test_listing_and_tests_allow_the_same_hosts(self) -> None:
        assert TESTS["config"]["allowedCudaVersions"] == CONFIG["allowedCudaVersions"]

    def test_image_and_driver_check_are_of_the_same_release(self) -> None:
        dockerfile = (ROOT / "Dockerfile").read_text()
        (image,) = re.findall(r"^FROM nvidia/cuda:([\d.]+)-", dockerfile, flags=re.MULTILINE)
        (minimum,) = re.findall(r"RUNPOD_MIN_CUDA_VERSION=([\d.]+)", dockerfile)
        assert version(image) == version(minimum) == self.torch_cuda()
