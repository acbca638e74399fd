"""How a process is started, and what it says about itself."""

import argparse
import os
import re

import pytest
import runpod.serverless as sdk
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sdxl_worker.serving.launch import check_local_job, has_a_job, help_text, keep_compiled_code, mode_of, wants_help
from sdxl_worker.serving.mode import Mode
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


@pytest.mark.parametrize("text", ["{nope", "[" * 100_000, "[]", '{"prompt": "a"}', '{"input": null}', "3"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_bad_local_job_is_one_sentence(text, from_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_input.json").write_text(text)
    name = "test_input.json" if from_file else "--test_input"
    with pytest.raises(ValueError, match=f'^{name} (is not valid JSON|has no "input")'):
        check_local_job(arguments(*(() if from_file else ("--test_input", text))))


def test_help_names_every_variable_and_every_option_of_the_sdk():
    text = help_text()
    for word in ("MODEL_ID", "BUCKET_SECRET_ACCESS_KEY", "DOWNLOAD_TIMEOUT", "(default 300.0)"):
        assert word in text
    for action in sdk.parser._actions:
        option, default = action.option_strings[-1], action.default
        shown = re.search(rf"^  {option}( [A-Z]+)?  .*", text, re.MULTILINE)
        assert shown or option == "--help", option
        if shown and default is not None:
            assert f"(default {default})" in shown[0]
    assert wants_help(["--x", "-h"])
    assert not wants_help(["--test_input", "{}"])


def test_compiled_code_is_kept_where_the_setting_says(tmp_path, monkeypatch, caplog):
    """What torch's own variables say goes first, and a folder that cannot be written leaves them alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set/by/the/operator")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").touch()
    keep_compiled_code(Settings(compile=1, compile_cache_dir=tmp_path / "file" / "compiled"))
    assert "COMPILE_CACHE_DIR" in caplog.text
    assert "TRITON_CACHE_DIR" not in os.environ
    keep_compiled_code(Settings(compile=1, compile_cache_dir=tmp_path / "compiled"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "set/by/the/operator"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "compiled" / "triton")


def test_the_folder_that_torch_chose_itself_gives_way(tmp_path, monkeypatch):
    """torch writes it into its variable while it is imported, which may come first."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    own = cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == own
    keep_compiled_code(Settings(compile=1, compile_cache_dir=tmp_path / "compiled"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_lora_kernel_is_kept_wherever_there_is_a_gpu(tmp_path, monkeypatch, has_gpu):
    """Without COMPILE nothing else is compiled, and without a GPU nothing at all."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("sdxl_worker.serving.launch._NVIDIA_DEVICES", (str(tmp_path if has_gpu else tmp_path / "no"),))
    keep_compiled_code(Settings(compile=0, compile_cache_dir=tmp_path / "compiled"))
    assert os.environ.get("TRITON_CACHE_DIR") == (str(tmp_path / "compiled" / "triton") if has_gpu else None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert (tmp_path / "compiled").exists() == has_gpu
