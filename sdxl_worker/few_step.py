"""One table: the LoRAs that draw a picture in few steps, how they are called, and the settings that they were made for.

Pure data, and the recognition of names. Settings are those of the places in `source`. Where these say guidance_scale 0
the table says 1: both draw without guidance, and 1 means the same in A1111 and ComfyUI, which read a picture's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

NO_GUIDANCE = 1.0
# More than any reference may have.
_MAX_TEXT = 4096


@dataclass(frozen=True)
class FewStep:
    """One kind of LoRA: `settings` are values of the request's fields, `name` is what sentences call it.

    `pattern` is looked for among the words of a name (`words_of`). `steps` and `guidance` are the lowest and highest
    values that it is made for, and `source` is the page that says all this.
    """

    name: str
    pattern: re.Pattern[str]
    settings: Mapping[str, Any]
    steps: tuple[int, int]
    guidance: tuple[float, float]
    source: str


def _row(
    name: str,
    pattern: str,
    source: str,
    *,
    steps: tuple[int, int] | None = None,
    guidance: tuple[float, float] = (0, NO_GUIDANCE),
    **settings: Any,
) -> FewStep:
    wanted = MappingProxyType({**settings, "guidance_scale": settings.get("guidance_scale", NO_GUIDANCE)})
    number = settings["num_inference_steps"]
    return FewStep(name, re.compile(rf"\b(?:{pattern})\b"), wanted, steps or (number, number), guidance, source)


_TRAILING = "sgm_uniform"


def _of_steps(name: str, steps: int, pattern: str, source: str, scheduler: str, **more: Any) -> FewStep:
    """A row for a LoRA that is made for one number of steps, which begin at the highest noise level."""
    settings: dict[str, Any] = {"scheduler": scheduler, "schedule_type": _TRAILING, "num_inference_steps": steps}
    return _row(f"{name}, {steps} steps", pattern, source, **settings, **more)


def _lightning(steps: int) -> FewStep:
    pattern = rf"(?:sdxl )?lightning (?:sdxl )?(?:lora )?{steps} steps?|{steps} steps? (?:sdxl )?lightning"
    return _of_steps("SDXL-Lightning", steps, pattern, "https://huggingface.co/ByteDance/SDXL-Lightning", "K_EULER")


_HYPER = "https://huggingface.co/ByteDance/Hyper-SD"


def _hyper(steps: int) -> FewStep:
    return _of_steps("Hyper-SD", steps, rf"hyper ?sdxl (?:lora )?{steps} steps?", _HYPER, "DDIM")


def _hyper_cfg(steps: int) -> FewStep:
    pattern = rf"hyper ?sdxl (?:lora )?(?:{steps} steps? (?:lora )?cfg|cfg (?:lora )?{steps} steps?)"
    return _of_steps("Hyper-SD CFG", steps, pattern, _HYPER, "DDIM", guidance=(5, 8), guidance_scale=5.5)


# The first whose pattern is found decides.
FEW_STEP: tuple[FewStep, ...] = (
    _row(
        "LCM-LoRA",
        r"lcm (?:sdxl )?loras?|lcm sdxl",
        "https://huggingface.co/latent-consistency/lcm-lora-sdxl",
        steps=(2, 8),
        guidance=(0, 2),
        scheduler="LCM",
        num_inference_steps=4,
    ),
    _lightning(2),
    _lightning(4),
    _lightning(8),
    _row(
        "SDXL-Turbo",
        r"sdxl turbo loras?|turbo sdxl loras?|sdxl loras? turbo",
        "https://huggingface.co/shiroppo/sd_xl_turbo_lora",
        steps=(1, 10),
        guidance=(0, 2.5),
        # The scheduler of https://huggingface.co/stabilityai/sdxl-turbo.
        scheduler="K_EULER_ANCESTRAL",
        schedule_type=_TRAILING,
        num_inference_steps=4,
    ),
    _row(
        "Hyper-SD, 1 step",
        r"hyper ?sdxl (?:lora )?1 steps?",
        _HYPER,
        # One file for 1 to 8 steps.
        steps=(1, 8),
        scheduler="TCD",
        num_inference_steps=1,
        eta=1.0,
    ),
    _hyper_cfg(8),
    _hyper_cfg(12),
    _hyper(2),
    _hyper(4),
    _hyper(8),
    _row(
        "TCD-LoRA",
        r"tcd (?:sdxl )?loras?|tcd sdxl",
        "https://huggingface.co/h1t/TCD-SDXL-LoRA",
        steps=(2, 50),
        scheduler="TCD",
        num_inference_steps=4,
        eta=0.3,
    ),
    _row(
        "DMD2",
        r"dmd ?2",
        "https://huggingface.co/tianweiy/DMD2",
        scheduler="LCM",
        num_inference_steps=4,
        timesteps=(999, 749, 499, 249),
    ),
)

# What makes of a name that of a LoRA for such a model, and not of the model's LoRA itself.
_FOR_IT = re.compile(r"\b(?:for|with|without|on|no|not|anti|and|non)$")
_LIKE_IT = re.compile(r"^(?:compatible|friendly|ready|style|merged?|trained|optimized|fix)\b")


def recognised(texts: Iterable[str]) -> FewStep | None:
    """The kind of LoRA that the first of `texts` names that names any: references, file names, titles."""
    for text in texts:
        words = words_of(text)
        for row in FEW_STEP:
            for found in row.pattern.finditer(words):
                before, after = words[: found.start()].rstrip(), words[found.end() :].lstrip()
                if not _FOR_IT.search(before) and not _LIKE_IT.search(after):
                    return row
    return None


def named(name: str) -> FewStep | None:
    """The row of that name; None for another name."""
    return next((row for row in FEW_STEP if row.name == name), None)


def words_of(text: str) -> str:
    """Words and numbers in lower case, with one space between them: `SD_XL-Foo4step` -> `sdxl foo 4 step`."""
    words = " ".join(re.findall(r"[a-z]+|[0-9]+", unquote(text[:_MAX_TEXT]).lower()))
    return re.sub(r"\bsd xl\b", "sdxl", words)
