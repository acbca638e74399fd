"""The worker's settings, read once from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast


def _variable(name: str, default: Any, meaning: str, *, secret: bool = False) -> Any:
    """A dataclass field that is filled from the environment variable `name`; `meaning` is its one-line help."""
    metadata = {"name": name, "meaning": meaning}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One value per environment variable of the README's table; secrets do not appear in the repr.

    Paths are not touched and nothing is created here. Raises ValueError, naming the variable, for a value that
    cannot be read as its type.
    """

    model_id: str = _variable(
        "MODEL_ID", "stabilityai/stable-diffusion-xl-base-1.0", "base model: Hub repo id, local folder or file, or tiny"
    )
    vae_id: str = _variable("VAE_ID", "madebyollin/sdxl-vae-fp16-fix", "VAE used on GPU; empty = the model's own")
    lora_cache_dir: Path = _variable("LORA_CACHE_DIR", Path("/models/loras"), "the hash-keyed LoRA cache")
    lora_preload: str = _variable("LORA_PRELOAD", "", "comma-separated LoRA references made ready before the first job")
    lora_cache_max_gb: float = _variable("LORA_CACHE_MAX_GB", 0.0, "evict least recently used cached files above this")
    lora_ram_cache_gb: float = _variable("LORA_RAM_CACHE_GB", 4.0, "parsed LoRAs kept in host memory")
    lora_max_mb: float = _variable("LORA_MAX_MB", 2048.0, "largest LoRA file accepted")
    download_timeout: float = _variable("DOWNLOAD_TIMEOUT", 300.0, "seconds a whole LoRA download may take")
    worker_concurrency: int = _variable(
        "WORKER_CONCURRENCY", 1, "2 = fetch the next job's LoRAs while this one renders"
    )
    hf_token: str = _variable("HF_TOKEN", "", "sent only to the Hugging Face Hub", secret=True)
    civitai_api_token: str = _variable("CIVITAI_API_TOKEN", "", "sent only to civitai.com", secret=True)
    hf_endpoint: str = _variable("HF_ENDPOINT", "https://huggingface.co", "the Hub, or the operator's mirror of it")
    bucket_endpoint_url: str = _variable("BUCKET_ENDPOINT_URL", "", "S3 endpoint for the pictures", secret=True)
    bucket_access_key_id: str = _variable("BUCKET_ACCESS_KEY_ID", "", "S3 key id", secret=True)
    bucket_secret_access_key: str = _variable("BUCKET_SECRET_ACCESS_KEY", "", "S3 secret", secret=True)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Read every variable; an unset one takes its default, VAE_ID may be set to empty on purpose."""
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for entry in fields(cls):
            name, default = entry.metadata["name"], cast(Any, entry.default)
            raw = environment.get(name)
            if raw is None or (raw.strip() == "" and name != "VAE_ID"):
                continue
            try:
                values[entry.name] = type(default)(raw.strip()) if not isinstance(default, Path) else Path(raw.strip())
            except ValueError:
                raise ValueError(f"{name} should be a {type(default).__name__}, not {raw!r}") from None
        settings = cls(**values)
        object.__setattr__(settings, "_named", frozenset(values))  # not a field: it is no variable of its own
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
