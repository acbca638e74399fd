"""Repos of a pipeline and of a VAE with next to nothing in them, and the Hub's cache on disk."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save

WEIGHTS = save({})
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")
PIPELINE = {
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "unet/config.json": b"{}",
    **{f"{name}/model.fp16.safetensors": WEIGHTS for name in COMPONENTS},
}
VAE = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": WEIGHTS}


def in_hub_cache(root: Path, repo: str, files: dict[str, bytes], *, refs: bool = True) -> Path:
    """A snapshot in the Hub's cache layout."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "c0ffee"
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    if refs:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c0ffee")
    return snapshot
