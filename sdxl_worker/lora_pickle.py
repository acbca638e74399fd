"""Convert a .pt or .bin LoRA (a pickle) to safetensors, in a subprocess with memory and time limits."""

from pathlib import Path


def convert_pickle(source: Path, target: Path) -> None:
    """Write the tensors of the pickle `source` to the safetensors file `target`; raises BadLoraFile."""
    raise NotImplementedError
