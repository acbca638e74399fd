"""No secret reaches a log line."""

import json
import logging
import os
import subprocess
import sys

import pytest

from sdxl_worker.logs import PLAIN, RunPodHandler, current_job, masked, quiet_http_libraries


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get https://user:word@a.b/c?token=x&y=1 now", "get https://***@a.b/c?*** now"),
        ("from bob:word@host/x", "from bob:***@host/x"),
        ("Bearer hf_secret", "Bearer ***"),
        ("half \ud800 pair", "half ? pair"),
        ("what? no URL", "what? no URL"),
    ],
)
def test_masked(text, shown):
    assert masked(text, ["hf_secret"]) == shown


def test_records_go_to_the_sdk_s_logger_with_the_job_s_id(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("RUNPOD_ENDPOINT_ID", raising=False)
    logger = logging.Logger("part")
    logger.addHandler(RunPodHandler(["s3cret"]))
    token = current_job.set("job-1")
    try:
        raise ValueError("https://a.b/c?key=1 s3cret")
    except ValueError:
        logger.exception("failed with %s", "s3cret")
    finally:
        current_job.reset(token)
    out = capsys.readouterr().out
    assert out.startswith("ERROR  | job-1 | part: failed with ***")
    assert "ValueError: https://a.b/c?*** ***" in out
    assert "s3cret" not in out
    assert "key=1" not in out


def test_on_runpod_lines_are_json(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e")
    logger = logging.Logger("part")
    logger.addHandler(RunPodHandler([]))
    logger.warning("hello")
    assert '"message": "part: hello", "level": "WARN"' in capsys.readouterr().out


HTTP_LIBRARIES = ("urllib3.connectionpool", "requests", "httpx", "httpcore.http11", "huggingface_hub", "botocore.auth")


def test_http_libraries_say_nothing_below_a_warning(monkeypatch: pytest.MonkeyPatch):
    for name in {*HTTP_LIBRARIES, *(name.partition(".")[0] for name in HTTP_LIBRARIES)}:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]  # what setLevel does
    quiet_http_libraries()
    for name in HTTP_LIBRARIES:
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("on_runpod", [False, True])
def test_a_plain_message_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch, on_runpod):
    monkeypatch.delenv("RUNPOD_ENDPOINT_ID", raising=False)
    if on_runpod:
        monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e")
    handler = RunPodHandler(["s3cret"])
    monkeypatch.setattr(handler._target, "level", "INFO")
    logger = logging.Logger("part")
    logger.addHandler(handler)
    # Longer than the SDK's limit, at which it cuts a message in the middle.
    facts = {"job": "job-1", "loras": [f"https://a.b/{number}?token=s3cret" for number in range(200)]}
    token = current_job.set("job-1")
    try:
        logger.info("%s", json.dumps(facts), extra={PLAIN: True})
        logger.debug("unseen", extra={PLAIN: True})
    finally:
        current_job.reset(token)
    (line,) = capsys.readouterr().out.splitlines()
    read = json.loads(line)
    if on_runpod:
        assert (read["requestId"], read["level"]) == ("job-1", "INFO")
        read = json.loads(read["message"])
    assert read == {"job": "job-1", "loras": [f"https://a.b/{number}?***" for number in range(200)]}


def test_a_prompt_that_diffusers_cuts_off_is_not_in_the_log():
    code = """
from sdxl_worker.logs import configure_logging
configure_logging(())
from diffusers.utils import logging
logging.get_logger("diffusers.pipelines.stable_diffusion_xl").warning("The following part was truncated: a secret wish")
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "a secret wish" not in done.stdout + done.stderr
