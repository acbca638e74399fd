"""PEFT's scaling facts, which diffusers and PEFT leave in a file's metadata instead of in tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_worker.lora.keys import MAX_NAME, alias_of
from sdxl_worker.lora.metadata import is_number, json_object

# Entries of an `alpha_pattern`; SDXL has about a thousand modules. A longer one is not an adapter's, and is left out.
MAX_PATTERN = 30_000


@dataclass(frozen=True)
class PeftScaling:
    """One component's scaling: alpha (None where it is not said), rank-stabilised or not, alphas for single modules.

    `pattern`: end of a module's alias -> (place in the file, alpha).
    """

    alpha: float | None = None
    rank_stabilised: bool = False
    pattern: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def alpha_of(self, alias: str, rank: int) -> float | None:
        """The alpha of the module `alias`: the first entry of the pattern that ends its name counts, as in PEFT."""
        parts = alias.split("_")
        ends = ("_".join(parts[start:]) for start in range(len(parts)))
        entries = [self.pattern[end] for end in ends if end in self.pattern] if self.pattern else []
        alpha = min(entries)[1] if entries else self.alpha
        return alpha * rank**0.5 if alpha is not None and self.rank_stabilised else alpha


def peft_scaling(metadata: Mapping[str, str]) -> dict[str, PeftScaling]:
    """The scaling by component, "" for a file that has one for all; all other settings are left out.

    Anything malformed is left out as well.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in json_object(metadata.get("lora_adapter_metadata", "")).items():
        component, _, setting = name.rpartition(".")
        entry = found.setdefault(component, {})
        if setting == "lora_alpha" and is_number(value):
            entry["alpha"] = float(value)
        elif setting == "use_rslora" and value is True:
            entry["rank_stabilised"] = True
        elif setting == "alpha_pattern" and isinstance(value, dict) and len(value) <= MAX_PATTERN:
            entry["pattern"] = {
                alias_of(module): (place, float(alpha))
                for place, (module, alpha) in enumerate(value.items())
                if len(module) <= MAX_NAME and is_number(alpha)
            }
    return {component: PeftScaling(**entry) for component, entry in found.items() if entry}
