"""Where a reference's bytes are right now."""

from dataclasses import dataclass

from sdxl_worker.assets.connect import Target


@dataclass(frozen=True)
class Location:
    """What to GET for a reference; `identity` changes when a moving reference moves, `sha256` ("" = unknown) is
    the host's own claim, `suffix` the kind that the file's name announces ("" = it announces nothing).
    `peft_config` is the adapter_config.json beside a PEFT adapter, which holds the alpha that its tensors lack."""

    target: Target
    identity: str = ""
    sha256: str = ""
    suffix: str = ""
    peft_config: Target | None = None
