"""The environment, read once: every variable of its type and in its range."""

from pathlib import Path

import pytest

from sdxl_worker.settings import Settings


def problem(**environment: str) -> str:
    with pytest.raises(ValueError, match=r"[A-Z_]+ (must|holds)") as caught:
        Settings.from_environment(environment)
    return str(caught.value)


def test_an_empty_environment_gives_the_defaults():
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"MODEL_ID": " ", "LORA_MAX_MB": "", "VAE_ID": ""}) == Settings(vae_id="")


def test_values_have_the_type_of_their_setting():
    given = {"LORA_MAX_MB": " 12 ", "WORKER_CONCURRENCY": "2", "LORA_CACHE_DIR": "/x", "DOWNLOAD_TIMEOUT": "0.5"}
    settings = Settings.from_environment(given)
    assert settings == Settings(lora_max_mb=12.0, worker_concurrency=2, lora_cache_dir=Path("/x"), download_timeout=0.5)
    assert isinstance(settings.lora_max_mb, float)


@pytest.mark.parametrize(
    ("name", "bad", "sentence"),
    [
        ("WORKER_CONCURRENCY", "7", "must be a whole number from 1 to 2, not 7"),
        ("WORKER_CONCURRENCY", "0", "must be a whole number from 1 to 2, not 0"),
        ("WORKER_CONCURRENCY", "two", "must be a whole number from 1 to 2, not 'two'"),
        ("WORKER_CONCURRENCY", "1.0", "must be a whole number from 1 to 2, not '1.0'"),
        ("LORA_MAX_MB", "-1", "must be a number above 0 to 100000, not -1.0"),
        ("LORA_MAX_MB", "0", "must be a number above 0 to 100000, not 0.0"),
        ("LORA_MAX_MB", "inf", "must be a number above 0 to 100000, not inf"),
        ("LORA_RAM_CACHE_GB", "nan", "must be a number from 0 to 100000, not nan"),
        ("LORA_RAM_CACHE_GB", "1e400", "must be a number from 0 to 100000, not inf"),
        ("LORA_CACHE_MAX_GB", "-0.1", "must be a number from 0 to 100000, not -0.1"),
        ("DOWNLOAD_TIMEOUT", "0", "must be a number above 0 to 86400, not 0.0"),
        ("DOWNLOAD_TIMEOUT", "9" * 5000, "must be a number above 0 to 86400, not inf"),
        ("PREDICTION_TYPE", "v", "must be one of epsilon, v_prediction, not 'v'"),
        ("COMPILE", "2", "must be a whole number from 0 to 1, not 2"),
        ("LORA_KERNEL", "2", "must be a whole number from 0 to 1, not 2"),
        ("ATTENTION", "sage", "must be one of flash, cudnn, efficient, math, not 'sage'"),
        ("HF_ENDPOINT", "hub.internal", "must be an http or https URL"),
        ("MODEL_ID", "a\ud800", "holds a NUL or half of a surrogate pair"),
    ],
)
def test_a_setting_out_of_range_is_named(name, bad, sentence):
    assert problem(**{name: bad}) == f"{name} {sentence}"


def test_every_problem_is_named_at_once():
    message = problem(WORKER_CONCURRENCY="7", LORA_MAX_MB="-1", DOWNLOAD_TIMEOUT="0", MODEL_ID="tiny")
    assert [sentence.split()[0] for sentence in message.split("; ")] == [
        "LORA_MAX_MB",
        "DOWNLOAD_TIMEOUT",
        "WORKER_CONCURRENCY",
    ]


def test_the_ends_of_the_ranges_are_taken():
    ends = {"LORA_CACHE_MAX_GB": "0", "LORA_RAM_CACHE_GB": "0", "LORA_MAX_MB": "100000", "DOWNLOAD_TIMEOUT": "86400"}
    settings = Settings.from_environment(ends)
    assert (settings.lora_cache_max_gb, settings.lora_ram_cache_gb) == (0.0, 0.0)
    assert (settings.lora_max_mb, settings.download_timeout) == (100_000.0, 86_400.0)


def test_secrets_are_never_shown():
    secret = "s3cr3t\ud800"
    names = ("HF_TOKEN", "CIVITAI_API_TOKEN", "BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    assert "s3cr3t" not in problem(**dict.fromkeys(names, secret))
    good = Settings.from_environment(dict.fromkeys(names, "s3cr3t"))
    assert "s3cr3t" not in repr(good)
    assert good.secrets == ("s3cr3t",) * 5


def test_what_was_set_on_purpose_is_known():
    same = Settings().vae_id
    assert Settings.from_environment({"VAE_ID": same}).is_set("vae_id")
    assert not Settings.from_environment({}).is_set("vae_id")
    assert Settings(vae_id="other").is_set("vae_id")
