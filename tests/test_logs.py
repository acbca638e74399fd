"""No secret reaches a log line."""

import logging

import pytest

from sdxl_worker.logs import RunPodHandler, current_job, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get https://a.b/c?token=x&y=1 now", "get https://a.b/c?*** now"),
        ("'https://user:word@a.b/c'", "'https://***@a.b/c'"),
        ("(https://a.b/c#frag)", "(https://a.b/c?***)"),
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
