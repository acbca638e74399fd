"""The worker's settings, read once from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from sdxl_worker.checks import Check, choice, number, text, url, whole

PROMPT_SYNTAXES = ("plain", "a1111")
PREDICTION_TYPES = ("epsilon", "v_prediction")
ATTENTION_KERNELS = ("flash", "cudnn", "efficient", "math")
# Linux does not pass longer variables to a process.
_TEXT = text(2**17)


def _variable(name: str, default: Any, meaning: str, check: Check = _TEXT, *, secret: bool = False) -> Any:
    """A dataclass field that is filled from the environment variable `name`; `meaning` is its one-line help.

    The default's type is the variable's, and `check` holds for the value once it has that type. A secret's check
    never shows the value.
    """
    metadata = {"name": name, "meaning": meaning, "check": check}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One value per environment variable of the README's table; secrets do not appear in the repr.

    Paths are not touched and nothing is created here, and values made directly are not checked.
    """

    model_id: str = _variable(
        "MODEL_ID", "stabilityai/stable-diffusion-xl-base-1.0", "base model: Hub repo id, local folder or file, or tiny"
    )
    vae_id: str = _variable("VAE_ID", "madebyollin/sdxl-vae-fp16-fix", "VAE used on GPU; empty = the model's own")
    preview_vae_id: str = _variable(
        "PREVIEW_VAE_ID", "", "small VAE that draws the previews, such as madebyollin/taesdxl; empty = rough colours"
    )
    refiner_id: str = _variable(
        "REFINER_ID", "", "SDXL refiner, in the forms of MODEL_ID; empty = none, and the refiner's fields do nothing"
    )
    prediction_type: str = _variable(
        "PREDICTION_TYPE",
        "",
        "what the base model predicts: epsilon or v_prediction; empty = as the model says",
        choice(PREDICTION_TYPES),
    )
    prompt_syntax: str = _variable(
        "PROMPT_SYNTAX", "plain", "how prompts are read that do not say it: plain or a1111", choice(PROMPT_SYNTAXES)
    )
    lora_cache_dir: Path = _variable("LORA_CACHE_DIR", Path("/models/loras"), "the hash-keyed LoRA cache")
    lora_preload: str = _variable("LORA_PRELOAD", "", "comma-separated LoRA references made ready before the first job")
    embedding_preload: str = _variable(
        "EMBEDDING_PRELOAD", "", "comma-separated embedding references fetched before the first job"
    )
    lora_cache_max_gb: float = _variable(
        "LORA_CACHE_MAX_GB", 0.0, "evict least recently used cached files above this", number(0, 100_000)
    )
    lora_ram_cache_gb: float = _variable(
        "LORA_RAM_CACHE_GB", 4.0, "parsed LoRAs kept in host memory", number(0, 100_000)
    )
    lora_max_mb: float = _variable("LORA_MAX_MB", 2048.0, "largest LoRA file accepted", number(0, 100_000, above=True))
    download_timeout: float = _variable(
        "DOWNLOAD_TIMEOUT", 300.0, "seconds a whole LoRA download may take", number(0, 86_400, above=True)
    )
    worker_concurrency: int = _variable(
        "WORKER_CONCURRENCY", 1, "2 = fetch the next job's LoRAs while this one renders", whole(1, 2)
    )
    compile: int = _variable(
        "COMPILE",
        0,
        "1 = compile the UNet's blocks and the VAE's decoder when the worker starts",
        whole(0, 1),
    )
    compile_cache_dir: Path = _variable(
        "COMPILE_CACHE_DIR", Path("/models/compiled"), "where compiled code is kept for the workers that start later"
    )
    attention: str = _variable(
        "ATTENTION",
        "",
        "attention kernel: flash, cudnn, efficient or math; empty = torch chooses",
        choice(ATTENTION_KERNELS),
    )
    lora_kernel: int = _variable(
        "LORA_KERNEL", 1, "0: torch merges LoRAs weight by weight on a GPU, instead of one kernel", whole(0, 1)
    )
    hf_token: str = _variable("HF_TOKEN", "", "sent only to the Hugging Face Hub", secret=True)
    civitai_api_token: str = _variable("CIVITAI_API_TOKEN", "", "sent only to Civitai", secret=True)
    civitai_endpoint: str = _variable(
        "CIVITAI_ENDPOINT", "https://civitai.com", "Civitai, or a stand-in of the operator's", url()
    )
    hf_endpoint: str = _variable(
        "HF_ENDPOINT", "https://huggingface.co", "the Hub, or the operator's mirror of it", url()
    )
    bucket_endpoint_url: str = _variable("BUCKET_ENDPOINT_URL", "", "S3 endpoint for the pictures", secret=True)
    bucket_access_key_id: str = _variable("BUCKET_ACCESS_KEY_ID", "", "S3 key id", secret=True)
    bucket_secret_access_key: str = _variable("BUCKET_SECRET_ACCESS_KEY", "", "S3 secret", secret=True)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Read every variable; an unset one takes its default, VAE_ID may be set to empty on purpose.

        Raises ValueError with a sentence for every variable that is out of range or not of its type.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        problems = []
        for entry in fields(cls):
            name = entry.metadata["name"]
            raw = environment.get(name)
            if raw is None or (raw.strip() == "" and name != "VAE_ID"):
                continue
            value = _typed(raw.strip(), type(cast(Any, entry.default)))
            checked = str(value) if isinstance(value, Path) else value
            if problem := entry.metadata["check"](checked):
                problems.append(f"{name} {problem}")
            values[entry.name] = value
        if problems:
            raise ValueError("; ".join(problems))
        settings = cls(**values)
        object.__setattr__(settings, "_named", frozenset(values))  # not a field: it is not a variable of its own
        return settings

    def is_set(self, name: str) -> bool:
        """True when the field `name` was given on purpose: by the environment, or as another value than its default."""
        default = {entry.name: entry.default for entry in fields(self)}[name]
        return getattr(self, name) != default or name in getattr(self, "_named", ())

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secret values in use, for masking logs."""
        return tuple(
            value for entry in fields(self) if not entry.repr and (value := str(getattr(self, entry.name)).strip())
        )


def _typed(raw: str, kind: type) -> Any:
    """`raw` as a value of `kind`, or the text itself where it is none: the check says so."""
    try:
        return kind(raw)
    except ValueError:
        return raw
