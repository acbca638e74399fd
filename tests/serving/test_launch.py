"""How a process is started, and what it says about itself."""

import argparse
import sys

import pytest
import runpod.serverless as sdk

import handler
from sdxl_worker.errors import ModelUnavailable
from sdxl_worker.serving.launch import check_local_job, get_ready, has_a_job, help_text, mode_of, sdk_config
from sdxl_worker.serving.mode import Mode
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker

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


@pytest.mark.parametrize("text", ["{nope", "[]", '{"prompt": "a"}', '{"input": null}', "3"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_bad_local_job_is_one_sentence(text, from_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_input.json").write_text(text)
    name = "test_input.json" if from_file else "--test_input"
    with pytest.raises(ValueError, match=f'^{name} (is not valid JSON|has no "input")'):
        check_local_job(arguments(*(() if from_file else ("--test_input", text))))


def test_help_names_every_variable_and_every_option_of_the_sdk():
    text = help_text(sdk.parser)
    for word in ("MODEL_ID", "BUCKET_SECRET_ACCESS_KEY", "DOWNLOAD_TIMEOUT", "(default 300.0)", "--rp_api_port"):
        assert word in text


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.API])
def test_a_missing_model_stops_a_person_s_run(mode, tmp_path):
    resident = Worker(Settings(model_id="/nowhere", lora_cache_dir=tmp_path / "loras"), mode)
    with pytest.raises(ModelUnavailable):
        get_ready(resident)


def test_a_missing_model_is_left_to_the_fitness_checks_on_runpod(tmp_path, caplog):
    resident = Worker(Settings(model_id="/nowhere", lora_cache_dir=tmp_path / "loras"), Mode.PRODUCTION)
    get_ready(resident)
    assert (tmp_path / "loras").is_dir()


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (0, 1)])
def test_concurrency(asked, given):
    config = sdk_config(Worker(Settings(worker_concurrency=asked)), None)  # type: ignore[arg-type]
    assert config["concurrency_modifier"](1) == given


@pytest.fixture
def command_line(monkeypatch, capsys, tmp_path):
    """Runs handler.main with these arguments and environment: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(handler, "configure_logging", lambda _: None)
    monkeypatch.setattr(sdk, "start", lambda _: pytest.fail("the worker was started"))

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["handler.py", *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        handler._worker.cache_clear()
        status = handler.main()
        handler._worker.cache_clear()
        return status, *capsys.readouterr()

    return run


def test_help_loads_nothing(command_line):
    status, out, err = command_line("--help", MODEL_ID="/nowhere")
    assert (status, err) == (0, "")
    assert "python handler.py --test_input" in out


def test_a_wrong_setting_is_one_clear_sentence(command_line):
    assert command_line(LORA_MAX_MB="many") == (1, "", "LORA_MAX_MB must be a number above 0 to 100000, not 'many'\n")


def test_a_model_that_is_not_there_is_one_clear_sentence(command_line, tmp_path):
    status, _, err = command_line(
        "--test_input", '{"input": {}}', MODEL_ID="/nowhere", LORA_CACHE_DIR=str(tmp_path / "loras")
    )
    assert status == 1
    assert err.count("\n") == 1
    assert "MODEL_ID" in err
