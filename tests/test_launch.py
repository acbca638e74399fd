"""How a process is started, and what it says about itself."""

import argparse

import pytest
import runpod.serverless as sdk

from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.launch import get_ready, has_a_job, help_text, mode_of, sdk_config
from sdxl_worker.resident import Mode, Resident
from sdxl_worker.settings import Settings

QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "http://queue"}


def arguments(*given: str) -> argparse.Namespace:
    return sdk.parser.parse_args(given)


@pytest.mark.parametrize(
    ("given", "environment", "mode"),
    [
        ([], {}, Mode.LOCAL),
        (["--test_input", "{}"], QUEUE, Mode.LOCAL),
        ([], QUEUE, Mode.PRODUCTION),
        (["--rp_serve_api"], QUEUE, Mode.API),
        ([], {**QUEUE, "RUNPOD_REALTIME_PORT": "8080"}, Mode.API),
    ],
)
def test_mode_follows_the_sdk(given, environment, mode, monkeypatch):
    for name in ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_REALTIME_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of(arguments(*given)) is mode


def test_a_local_run_needs_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not has_a_job(Mode.LOCAL, arguments())
    assert has_a_job(Mode.LOCAL, arguments("--test_input", "{}"))
    assert has_a_job(Mode.PRODUCTION, arguments())
    (tmp_path / "test_input.json").write_text("{}")
    assert has_a_job(Mode.LOCAL, arguments())


def test_help_names_every_variable_and_every_option_of_the_sdk():
    text = help_text(sdk.parser)
    for word in ("MODEL_ID", "BUCKET_SECRET_ACCESS_KEY", "DOWNLOAD_TIMEOUT", "(default 300.0)", "--rp_api_port"):
        assert word in text


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.API])
def test_a_missing_model_stops_a_person_s_run(mode, tmp_path):
    resident = Resident(Settings(model_id="/nowhere", lora_cache_dir=tmp_path / "loras"), mode)
    with pytest.raises(ModelUnavailable):
        get_ready(resident, lambda: pytest.fail("preloaded without a model"))


def test_a_missing_model_is_left_to_the_fitness_checks_on_runpod(tmp_path, caplog):
    resident = Resident(Settings(model_id="/nowhere", lora_cache_dir=tmp_path / "loras"), Mode.PRODUCTION)
    get_ready(resident, lambda: pytest.fail("preloaded without a model"))
    assert (tmp_path / "loras").is_dir()


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (0, 1)])
def test_concurrency(asked, given):
    config = sdk_config(Resident(Settings(worker_concurrency=asked)), None)  # type: ignore[arg-type]
    assert config["concurrency_modifier"](1) == given
