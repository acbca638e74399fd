"""A LoRA as the text in a picture names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from sdxl_worker.request import LoraScale

_CACHE_PREFIX = re.compile(r"^[0-9a-f]{12}_(?=.)")
# What ends a name inside <lora:...> or inside the quoted list of hashes.
_NOT_IN_A_NAME = re.compile(r'[<>:,"\s\\]+')


@dataclass(frozen=True)
class UsedLora:
    """One LoRA of a picture: `name` is its file name in the cache, `hash` what A1111, Forge and Civitai look up.

    `in_prompt` says that the prompt has a tag for it already.
    """

    name: str
    scale: LoraScale
    hash: str
    in_prompt: bool = False

    @property
    def short_name(self) -> str:
        """The file name without the cache's hash and the suffix, safe inside `<lora:...>`."""
        return safe_name(_CACHE_PREFIX.sub("", PurePosixPath(self.name).stem)) or "lora"

    @property
    def tag(self) -> str:
        """`<lora:name:scale>`, or `<lora:name:text encoder scale:UNet scale>` where the two differ."""
        text, unet = self.scale.text_encoder, self.scale.unet
        scales = f"{unet:g}" if text == unet else f"{text:g}:{unet:g}"
        return f"<lora:{self.short_name}:{scales}>"


def safe_name(text: str) -> str:
    """`text` without what would end a name in a picture's text."""
    return _NOT_IN_A_NAME.sub("_", text)
