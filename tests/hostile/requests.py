"""Requests that are wrong: types, ranges, sizes, depths, names and references."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from tests.hostile.case import SECRET, Case, job, words

FIELDS = (
    *(
        "prompts",
        "seeds",
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "seed",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
    ),
    *(
        "num_images",
        "image_url",
        "image",
        *("mask_url", "mask", "mask_blur", "invert_mask", "inpaint_full_res", "inpaint_padding", "extend"),
        "strength",
        "refiner_inference_steps",
        "high_noise_frac",
        "loras",
        "output_format",
    ),
    *("output_quality", "preview", "prompt_syntax", "prompt_emphasis", "clip_skip", "inspect_prompt", "embeddings"),
)
SCHEDULERS = (
    *("PNDM", "KLMS", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("DPM++ 2M SDE Karras", "dpmpp_sde", "heun", "LCM", "TCD", "DPM++ 2S a", "sa_solver", "DPM2 a Beta"),
)


def deep(random: Random) -> Any:
    """Lists or objects inside each other."""
    value: Any = random.choice((1, "x", None))
    as_list = random.random() < 0.5
    for _ in range(random.choice((5, 900, 20_000))):
        value = [value] if as_list else {"a": value}
    return value


HUGE = (2**31, 2**63, 2**64 - 1, 2**64, 10**400, 10**4000, -(10**30))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e30, 3.5e38, 1e300, math.nan, math.inf, -math.inf)
WORDS = words("x 1 64 null NaN DDIM ddim png webp jpeg auto gif http:// https://[ ftp://x/y data:image/png,x %s%n{}")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 65, 72, 96, 1001, *HUGE, *FLOATS),
    *("", " ", *WORDS, "http://\0", "\0", "\ud800", "\udfff\ud800", "\U0001f600", "\u202egnp", "\x1b[31m"),
    *([], {}, [[]], [None], [{}], {"a": 1}, {"": ""}, (), b"bytes"),
)
NAMES = words("""
    . .. ../x /etc/passwd /models/loras/../../etc/passwd ~root a\\b C:\\x -rf con nul.safetensors .hidden .quarantine/x
    a/ / // a//b none.safetensors none.pt none.bin tiny-example tiny-example.safetensors
    user/repo user/repo@main user/repo@../x user/repo/../../x
    civitai:1 civitai:1@2 civitai:-1 civitai:1@x civitai: urn:air:sdxl:lora:civitai:1@2 urn:air:sdxl:lora:other:1@2 urn:
    file:///etc/passwd ftp://a/b data:,x gopher://127.0.0.1:1/_x http:x https:/x http:// http:///x http://[ http://[::1
    http://[::1]:x/ http://a:99999999999/ http://a:-1/ http://@/ http://127.0.0.1:1/x.safetensors http://127.1/x
    http://0x7f.1/x http://2130706433/x http://0/x http://[::]/x http://169.254.169.254/latest/meta-data
    http://168.63.129.16/x http://[::ffff:10.0.0.1]/x http://[64:ff9b::a00:1]/x http://[2002:a00:1::]/x
    http://192.0.0.192/x http://10.0.0.1/x http://localhost/x http://x.invalid/y http://ü.invalid/
    https://civitai.com/ https://civitai.com/models/x https://hf.co https://huggingface.co/a/b/blob/main/
    https://huggingface.co/api/models/a/b https://huggingface.co/a
""")
LONG = (
    *("x" * 300, "é" * 300, "x" * 4096, "x" * 4097, "user/repo@" + "r" * 500, "u/" + "r" * 97, "a/b/c/d" * 500),
    *("civitai:" + "9" * 4000, "civitai:1@" + "9" * 4000, "urn:air:" + ":" * 3000, "x://a:b" + "//" * 2000),
    *("http://" + "a" * 300 + ".invalid/x", "http://" + "a." * 500 + "invalid/", "http://x.invalid/" + "a" * 4000),
    "https://civitai.com/models/1?modelVersionId=" + "9" * 500,
)
SECRETS = words(f"""
    http://bob:{SECRET}@127.0.0.1:1/x http://bob:{SECRET}?x@127.0.0.1/ http://bob:{SECRET}#@127.0.0.1/x bob:{SECRET}@h/x
    https:bob:{SECRET}@host http://127.0.0.1:1/x?token={SECRET} http://u%3a{SECRET}%40h/x http://[bad?sig={SECRET}
    http://127.0.0.1:1/x#{SECRET} http://127.0.0.1:1/x.safetensors?X-Amz-Signature={SECRET}&b=1
""")
# What people and others call embeddings.
TOKENS = (
    "bad hands",
    "(x)",
    "[a|b:0.5]",
    "<s0>",
    "<s0><s1>",
    "BREAK",
    "a",
    "*",
    ":",
    "\\",
    "e" * 200,
    "\u0345\u0345",
    "x " * 90,
)
REFERENCES = ("", " ", "a\0b", "\ud800", *NAMES, *LONG, *SECRETS)
SCALES: tuple[Any, ...] = (
    *(0, 1, -1, 0.8, 100, -100, 100.1, -1e30, 1e300, 3.5e38, 10**400, math.nan, math.inf, None, True, "1", [], {}),
    *({"unet": 1}, {"unet": 1e300}, {"text_encoder": None}, {"vae": 1}, {"unet": {}}, {"unet": 0, "text_encoder": 0.5}),
)


def entry(random: Random) -> Any:
    """One entry of `loras`."""
    reference = random.choice(REFERENCES)
    if random.random() < 0.3:
        return random.choice((reference, reference, *VALUES))
    made: dict[str, Any] = {random.choice(("path", "url", "source")): reference}
    if random.random() < 0.7:
        made["scale"] = random.choice(SCALES)
    if random.random() < 0.4:
        made[random.choice(("start", "end"))] = random.choice((0, 0.5, 1, 1e-9, *SCALES))
    if random.random() < 0.4:
        made["name"] = random.choice((*REFERENCES, *VALUES))
    if random.random() < 0.2:
        made[random.choice(("path", "url", "weight", "", "\ud800", "x" * 5000))] = random.choice(VALUES)
    return made


def _one_field(random: Random) -> dict[str, Any]:
    return {random.choice(FIELDS): random.choice(VALUES)}


def _several_fields(random: Random) -> dict[str, Any]:
    names = random.sample(FIELDS, random.randrange(2, 8))
    return {name: random.choice(VALUES) for name in names}


def _good(random: Random) -> dict[str, Any]:
    return {
        "prompt": "".join(chr(random.randrange(32, 0x2FFF)) for _ in range(random.randrange(200)))
        + "".join(random.choices(("(", "[", ")", "]", ":1.3)", ":-2)", "a", ", ", " BREAK "), k=random.randrange(30))),
        "prompt_syntax": random.choice((None, "plain", "a1111")),
        "prompt_emphasis": random.choice(("original", "no_norm", "comfyui")),
        "clip_skip": random.choice((1, 2, 3)),
        "negative_prompt": random.choice((None, "", "fog, " * 40)),
        "scheduler": random.choice(SCHEDULERS),
        "num_inference_steps": random.choice((1, 2, 4)),
        "schedule_type": random.choice(("automatic", "automatic", "SGM Uniform", "Karras")),
        "timesteps": random.choice((None, None, None, [999, 499], [0], list(range(999, 899, -1)))),
        "eta": random.choice((None, 0, 1)),
        "guidance_rescale": random.choice((0, 0.7, 1)),
        "cfg_end": random.choice((1, 1, 0, 0.5, 1e-9)),
        "deep_cache": random.choice((1, 1, 2, 10)),
        "seed": random.choice((None, -1, 0, 2**64 - 1)),
        "guidance_scale": random.choice((0, 1, 7.5, 100)),
        "num_images": random.choice((1, 1, 8)),
        "output_format": random.choice(("png", "jpeg", "webp", "auto")),
        "output_quality": random.choice((1, 50, 100)),
        "preview": random.random() < 0.5,
        "loras": random.choice((None, [], ["tiny-example"], [{"name": "tiny-example", "scale": -1}] * 3)),
    }


def _hires(random: Random) -> dict[str, Any]:
    made = {name: random.choice((*VALUES, 1, 1.5, 0.4, "latent", 2**70)) for name in ("scale", "steps", "strength")}
    names = random.sample(("scale", "steps", "strength", "upscaler", "x" * 9_000, "\ud800", ""), random.randrange(5))
    few = {name: made.get(name, random.choice(VALUES)) for name in names}
    right = {"scale": random.choice((1, 1.3, 2)), "steps": 2, "upscaler": random.choice(("latent", "lanczos"))}
    many = {f"k{index}": index for index in range(3000)}
    return {"hires": random.choice((few, few, right, many, [few], {"hires": right})), "width": 64, "height": 72}


def _loras(random: Random) -> dict[str, Any]:
    return {"loras": [entry(random) for _ in range(random.choice((1, 1, 1, 2, 5, 33)))]}


def _embeddings(random: Random) -> dict[str, Any]:
    made = [entry(random) for _ in range(random.choice((1, 1, 2, 65)))]
    for one in made:
        if isinstance(one, dict) and random.random() < 0.7:
            one["token"] = random.choice((*TOKENS, *VALUES))
    prompt = " ".join(random.choice(TOKENS) for _ in range(random.choice((1, 50, 400))))
    return {"embeddings": made, "prompt": prompt[:10_000], "prompt_syntax": random.choice(("plain", "a1111"))}


def _tags(random: Random) -> dict[str, Any]:
    numbers = (":1", ":0.5:1", ":te=1:unet=x", ":nan", ":" * 50, ":1e999", ":-101", ">", "", ":1:1:1", ":٣")
    tags = [f"<lora:{random.choice(REFERENCES)}{random.choice(numbers)}>" for _ in range(random.choice((1, 2, 33)))]
    prompt = " ".join(tags).replace("\0", "").encode("utf-8", "ignore").decode()[:10_000]
    return {random.choice(("prompt", "prompt", "negative_prompt")): prompt, "prompt_syntax": "a1111"}


def _many(random: Random) -> dict[str, Any]:
    """Lists with an entry for each picture: of any length, with odd entries now and then."""
    prompts = ("", "a", "a (cat:1.3)", "a BREAK b", "x " * 400, "\ud800", "<lora:tiny-example:0.5>", "(" * 3000)
    seeds = (-1, 0, 7, 2**64 - 1, *((2**64, -2, None, 1.5, True) if random.random() < 0.3 else ()))
    length = random.choice((1, 2, 3, 8, 9))
    made: dict[str, Any] = {
        "prompts": [random.choice(prompts[: 5 + random.randrange(4)]) for _ in range(length)],
        "seeds": [random.choice(seeds) for _ in range(random.choice((length, length, 2)))],
        "num_images": random.choice((1, length)),
        "prompt": random.choice((None, "", "a")),
        "seed": random.choice((None, -1, 5)),
        "prompt_syntax": random.choice(("plain", "a1111")),
    }
    return {name: value for name, value in made.items() if name in ("prompt", "seed") or random.random() < 0.7}


def _unknown(random: Random) -> dict[str, Any]:
    names = ("", "Prompt", "__class__", "\ud800", "x" * 10_000, "loras[0]", "a\nb")
    many = {f"f{index}": None for index in range(random.choice((0, 0, 3000)))}
    return {random.choice(names): random.choice(VALUES), **many}


def _deep(random: Random) -> dict[str, Any]:
    return {random.choice((*FIELDS, "deep")): deep(random)}


def _large(random: Random) -> dict[str, Any]:
    piece = random.choice(("x", "\ud800", "//@", "http://a:b@", "civitai:9", "../", "a b", "%41", "(((", "\u0345"))
    text = piece * (random.choice((9_000, 70_000, 1_999_000, 3_000_000)) // len(piece))
    return random.choice(
        (
            {"prompt": text, "prompt_syntax": random.choice(("plain", "a1111"))},
            {"negative_prompt": text},
            {"scheduler": text},
            {"image_url": text},
            {"image_url": "http://127.0.0.1:1/" + text},
            {"loras": [text]},
            {"loras": [{"path": text[:4096], "name": text[:4096]}] * 32},
            {"loras": [{"path": "x", text: 1, "scale": {text: 1}}]},
            {"loras": [text[:65_536]] * 30},
            {text: text},
        )
    )


def _picture_url(random: Random) -> dict[str, Any]:
    return {"image_url": random.choice(REFERENCES), "strength": random.choice((0, 0.3, 1))}


def _no_object(random: Random) -> Any:
    return random.choice((None, [], "x", 3, math.nan, True, deep(random), {}, {"input": {}}))


_KINDS: tuple[tuple[int, Callable[[Random], Any]], ...] = (
    (5, _one_field),
    (4, _several_fields),
    (2, _good),
    (2, _hires),
    (8, _loras),
    (2, _embeddings),
    (2, _tags),
    (3, _many),
    (2, _unknown),
    (1, _deep),
    (2, _large),
    (3, _picture_url),
    (1, _no_object),
)


def make(random: Random, _host: str) -> Case:
    """One wrong request; some are right by chance, or odd but right."""
    (kind,) = random.choices([kind for _, kind in _KINDS], [weight for weight, _ in _KINDS])
    fields = kind(random)
    shown = "deep" if kind is _deep or kind is _no_object else ascii(fields)[:150]
    what = f"{kind.__name__.strip('_')}: {shown}"
    if kind is _no_object:
        return Case(
            what[:150], random.choice((fields, {"input": fields}, {"id": fields, "input": fields})), served=False
        )
    return Case(what, job(**fields), served=False)
