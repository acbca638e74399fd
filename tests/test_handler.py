"""The names of the original worker, and how a process starts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
import runpod.serverless as sdk
import torch

import handler
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.settings import Settings
from sdxl_worker.topology import EXAMPLE_LORA, write_example_lora
from sdxl_worker.worker import Worker
from tests.integration.worker_process import ROOT

JOB = {"id": "job", "input": {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1, "seed": 5}}


@pytest.fixture
def process(monkeypatch) -> handler.Process:
    """What the module's functions work with, as in a process that has just started."""
    fresh = handler.Process()
    monkeypatch.setattr(handler, "process", fresh)
    return fresh


@pytest.fixture
def worker(process, pipeline, engine: LoraEngine, tmp_path, monkeypatch) -> Worker:
    """The process's worker, on the session's pipeline and a cache folder with the example LoRA."""
    process.worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))
    write_example_lora(process.worker.settings.lora_cache_dir)
    process.worker.resident.use(pipeline)
    monkeypatch.setattr(process.worker, "engine_of", lambda _: engine)
    return process.worker


def test_generate_image_and_handler_give_the_worker_s_answer(worker):
    answer = handler.generate_image(JOB)
    assert answer["seed"] == 5
    assert asyncio.run(handler.handler(JOB)) == answer
    assert handler.generate_image({})["error"].startswith("INVALID_INPUT: ")


def test_the_original_helpers(worker):
    def weights() -> torch.Tensor:
        return torch.cat([parameter.flatten() for parameter in worker.pipeline.unet.parameters()]).clone()

    before = weights()
    paths, scales = handler._load_loras(worker.pipeline, [{"path": "tiny-example", "scale": 0.5}, None])
    assert [path.name for path in paths] == [EXAMPLE_LORA]
    assert scales[0].unet == 0.5
    handler._apply_loras_to_pipeline(worker.pipeline, paths, scales)
    changed = weights()
    assert not torch.equal(changed, before)
    handler._apply_loras_to_pipeline(worker.pipeline, list(paths), [0.5])
    assert torch.equal(weights(), changed)
    handler._unload_loras_from_pipeline(worker.pipeline)
    assert torch.equal(weights(), before)


def test_importing_the_handler_and_its_help_need_neither_torch_nor_the_sdk():
    script = (
        "import sys, handler; sys.argv = ['handler.py', '--help']; assert handler.main() == 0; "
        "assert not {'torch', 'runpod', 'cpuinfo', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python handler.py --test_input" in done.stdout


@pytest.fixture
def command_line(process, monkeypatch, capsys, tmp_path):
    """Runs handler.main with these arguments and environment: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdxl_worker.logs.configure_logging", lambda _: None)
    monkeypatch.setattr(sdk, "start", lambda _: pytest.fail("the worker was started"))

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["handler.py", *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return handler.main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("LORA_MAX_MB", "many", "LORA_MAX_MB"),
        ("MODEL_ID", "/nowhere", "MODEL_ID"),
        ("RUNPOD_REALTIME_PORT", "http", "RUNPOD_REALTIME_PORT should be a whole number, not 'http'"),
        ("RUNPOD_REALTIME_PORT", "", "RUNPOD_REALTIME_PORT should be a whole number, not ''"),
        ("RUNPOD_REALTIME_PORT", "70000", "RUNPOD_REALTIME_PORT should be between 0 and 65535"),
        ("RUNPOD_REALTIME_CONCURRENCY", "x", "RUNPOD_REALTIME_CONCURRENCY should be a whole number"),
        ("RUNPOD_LOG_LEVEL", "LOUD", "RUNPOD_LOG_LEVEL should be one of NOTSET, TRACE, DEBUG"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(command_line, tmp_path, name, value, sentence):
    environment = {"MODEL_ID": "tiny", "LORA_CACHE_DIR": str(tmp_path / "loras"), name: value}
    status, out, err = command_line("--test_input", '{"input": {}}', **environment)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert sentence in err


def test_a_wrong_log_level_is_one_clear_sentence(command_line):
    status, out, err = command_line("--rp_log_level", "LOUD")
    assert (status, out) == (1, "")
    assert err == "--rp_log_level should be one of NOTSET, TRACE, DEBUG, INFO, WARN, ERROR, not 'LOUD'\n"


def test_the_sdk_s_start_gets_the_handler_and_the_checks(command_line, process, pipeline, tmp_path, monkeypatch):
    started: list[dict[str, Any]] = []
    registered: list[Any] = []
    monkeypatch.setattr(sdk, "start", started.append)
    monkeypatch.setattr(sdk, "register_fitness_check", registered.append)
    process.worker = Worker(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras", worker_concurrency=2))
    process.worker.resident.use(pipeline)
    assert command_line("--test_input", '{"input": {"prompt": "a"}}')[0] == 0
    assert started[0]["handler"] == process.service.handle
    assert started[0]["concurrency_modifier"](1) == 2
    names = ["check_model", "check_refiner", "check_cache_folder", "check_gpu_memory", "check_bucket"]
    assert [check.__name__ for check in registered] == names
