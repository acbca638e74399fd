"""Show how a prompt is read: chunk, token and weight for both text encoders.

The tokenizers are MODEL_ID's, and those of SDXL base for a model that is a single file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.prompts.inspect import inspection
from sdxl_worker.prompts.notes import notes_on
from sdxl_worker.prompts.vectors import ENCODERS
from sdxl_worker.request import EMPHASIS_RULES
from sdxl_worker.request.validation import validate_request
from sdxl_worker.settings import PROMPT_SYNTAXES, Settings

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and what there is to be warned of; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_worker.prompts", description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--negative", metavar="PROMPT", help="the negative prompt")
    parser.add_argument("--syntax", choices=PROMPT_SYNTAXES, help="default: PROMPT_SYNTAX")
    parser.add_argument("--emphasis", choices=EMPHASIS_RULES, default=EMPHASIS_RULES[0])
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_environment()
        fields = {
            "prompt": options.prompt,
            "negative_prompt": options.negative,
            "prompt_syntax": options.syntax or settings.prompt_syntax,
            "prompt_emphasis": options.emphasis,
        }
        request = validate_request(fields)
        tokenizers = find_tokenizers(settings)
        found = inspection(request, tokenizers)
    except (InvalidRequest, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{found['table']}\n")
    sys.stderr.writelines(f"{sentence}\n" for sentence in notes_on(request, tokenizers))
    return 0


def find_tokenizers(settings: Settings) -> dict[str, Any]:
    """Each text encoder's tokenizer; raises OSError with a sentence when they cannot be had."""
    if settings.model_id == "tiny":
        from sdxl_worker.topology import tokenizers

        return dict(zip(ENCODERS, tokenizers(), strict=True))
    from transformers import CLIPTokenizer

    folder = _model_folder(settings)
    found = {name: folder / name.replace("text_encoder", "tokenizer") for name in ENCODERS}
    # transformers makes an empty tokenizer of a folder without these.
    if not all((path / "vocab.json").is_file() or (path / "tokenizer.json").is_file() for path in found.values()):
        raise OSError(f"MODEL_ID has no tokenizers in {folder.name}")
    return {name: CLIPTokenizer.from_pretrained(path) for name, path in found.items()}


def _model_folder(settings: Settings) -> Path:
    """A folder that holds at least the tokenizers."""
    local = Path(settings.model_id).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    is_file = local.is_file() or ":" in settings.model_id
    repo, _, revision = (SDXL_BASE if is_file else settings.model_id).partition("@")
    for only_here in (True, False):
        with contextlib.suppress(Exception):
            found = snapshot_download(
                repo,
                revision=revision or None,
                token=settings.hf_token or None,
                allow_patterns=["tokenizer*/*"],
                local_files_only=only_here,
            )
            return Path(found)
    raise OSError(f"the tokenizers of {repo} are neither on this machine nor can they be downloaded")


if __name__ == "__main__":
    sys.exit(main())
