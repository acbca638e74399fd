"""fault rows 1-13: every bad input is refused at once, with every problem named."""

import math
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from runpod.serverless.utils.rp_validator import validate

from schemas import INPUT_SCHEMA, validate_request
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import FIELDS, Extend, LoraScale, LoraSpan, LoraSpec

GOOD = {"prompt": "a lighthouse"}
SURROGATE = "\ud800"


def problem(**fields) -> str:
    with pytest.raises(InvalidRequest) as caught:
        validate_request({**GOOD, **fields})
    message = str(caught.value)
    assert message.isascii()
    assert len(message) < 5_000
    return message


def test_defaults_are_the_documented_ones():
    request = validate_request(GOOD)
    assert (request.width, request.height, request.num_inference_steps, request.num_images) == (1024, 1024, 28, 1)
    assert (request.scheduler, request.guidance_scale, request.negative_prompt) == ("K_EULER_ANCESTRAL", 5.5, None)
    assert (request.loras, request.loras_requested, request.warnings) == ((), False, ())
    assert (request.output_format, request.output_quality, request.preview) == ("png", 90, False)


def test_every_field_arrives_as_it_was_asked_for():
    asked = {
        "prompt": "a harbour",
        "negative_prompt": "fog",
        "prompt_syntax": "a1111",
        "prompt_emphasis": "comfyui",
        "clip_skip": 3,
        "inspect_prompt": True,
        "height": 64,
        "width": 128,
        "seed": 7,
        "scheduler": "DDIM",
        "schedule_type": "simple",
        "num_inference_steps": 3,
        "timesteps": None,
        "eta": 0.5,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.25,
        "cfg_end": 0.5,
        "deep_cache": 3,
        "num_images": 4,
        "image_url": "https://example.com/a.png",
        "mask_url": "https://example.com/b.png",
        "mask_blur": 2.5,
        "invert_mask": True,
        "inpaint_full_res": True,
        "inpaint_padding": 7,
        "strength": 0.75,
        "refiner_inference_steps": 9,
        "high_noise_frac": 0.5,
        "output_format": "jpeg",
        "output_quality": 37,
        "preview": True,
    }
    # Other names of these, and what does not go together with them, have tests of their own.
    assert set(FIELDS) == {*asked, "prompts", "seeds", "loras", "embeddings", "image", "mask", "extend", "hires"}
    arrived = asdict(validate_request(asked))
    assert {name: arrived[name] for name in asked} == asked


@pytest.mark.parametrize(
    ("fields", "arrived"), [({}, None), ({"negative_prompt": None}, None), ({"negative_prompt": ""}, "")]
)
def test_only_an_explicit_empty_negative_prompt_is_one(fields, arrived):
    negative = validate_request({**GOOD, **fields}).negative_prompt
    assert negative == arrived
    assert type(negative) is type(arrived)


@pytest.mark.parametrize("fields", [{}, {"seed": None}, {"seed": -1}])
def test_a_random_seed_is_small_enough_for_every_json_reader(fields):
    seeds = {validate_request({**GOOD, **fields}).seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize("raw", [None, [], "text", 3, True])
def test_row_1_input_that_is_not_an_object(raw):
    with pytest.raises(InvalidRequest, match="input must be an object"):
        validate_request(raw)


def test_row_2_unknown_fields_are_named():
    assert "'promt' is not an input field" in problem(promt="x")
    assert r"'\ud800'" in problem(**{SURROGATE: 1})
    problem(**{f"field{index}": 1 for index in range(10_000)})


@pytest.mark.parametrize("prompt", [["a"], 7, {}, "x" * 10_001])
def test_row_3_prompt(prompt):
    assert problem(prompt=prompt).startswith("prompt must")


@pytest.mark.parametrize("fields", [{}, {"prompt": None}, {"prompts": None}])
def test_row_3_prompt_is_required(fields):
    with pytest.raises(InvalidRequest, match=r"^prompt is required$"):
        validate_request({"width": 1024, **fields})


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "scheduler", "image_url", "output_format"])
@pytest.mark.parametrize("bad", ["\0", SURROGATE])
def test_row_4_nul_and_lone_surrogates(field, bad):
    assert field in problem(**{field: f"http://a{bad}"})


def test_row_4_lone_surrogate_in_a_lora_reference():
    assert "entry 1" in problem(loras=["good", {"path": SURROGATE}])


@pytest.mark.parametrize("side", [1001, 0, -64, 10**6, 64.0, "64", True, None, pytest.param(10**5000, id="huge")])
def test_row_5_sides(side):
    message = problem(width=side, height=side)
    assert "width must be a whole number from 64 to 2048 and a multiple of 8" in message
    assert "height" in message


def test_row_5_budget():
    assert "must be at most 268435456" in problem(width=2048, height=2048, num_inference_steps=65)
    assert validate_request({**GOOD, "width": 2048, "height": 2048, "num_inference_steps": 64}).width == 2048
    both = problem(width=2048, height=2048, num_inference_steps=200, seed=-2)
    assert "seed" in both
    assert "at most 268435456" in both


@pytest.mark.parametrize("steps", [0, -3, 10**9, True, 2.5])
def test_row_6_steps(steps):
    assert "num_inference_steps must be a whole number from 1 to 200" in problem(num_inference_steps=steps)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf, -1, "7", False, 10**400])
def test_row_6_guidance(guidance):
    assert "guidance_scale must be a number from 0 to 100" in problem(guidance_scale=guidance)


def test_an_integer_guidance_becomes_a_float():
    assert isinstance(validate_request({**GOOD, "guidance_scale": 7}).guidance_scale, float)


@pytest.mark.parametrize("count", [0, 9, "1", True, None])
def test_row_7_num_images(count):
    assert "num_images must be a whole number from 1 to 8" in problem(num_images=count)


@pytest.mark.parametrize(
    ("fields", "number", "seed"),
    [
        ({"seeds": [7, 0, 2**64 - 1]}, 3, 7),
        ({"seeds": [7], "num_images": 1, "seed": None}, 1, 7),
        ({"seeds": [7, 8], "num_images": 2, "seed": -1}, 2, 7),
        ({"prompt": "", "prompts": ["a", "", "c"], "seed": 5}, 3, 5),
        ({"prompt": None, "prompts": ["a", "b"], "seeds": [9, 9]}, 2, 9),
    ],
)
def test_lists_with_an_entry_for_each_picture(fields, number, seed):
    request = validate_request({**GOOD, **fields})
    assert (request.num_images, request.seed) == (number, seed)
    assert request.seeds == tuple(fields.get("seeds", ()))
    assert [request.prompt_of(index) for index in range(number)] == fields.get("prompts", ["a lighthouse"] * number)


def test_minus_one_in_seeds_is_a_random_one():
    request = validate_request({**GOOD, "seeds": [-1, 3, -1]})
    assert request.seed == request.seeds[0]
    assert request.seeds[1] == 3
    assert all(0 <= seed < 2**32 for seed in request.seeds)
    assert len(set(request.seeds)) == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": []}, "seeds must hold 1 to 8 entries, not 0"),
        ({"seeds": [1] * 9}, "seeds must hold 1 to 8 entries, not 9"),
        ({"seeds": 5}, "seeds must be a list, not 5"),
        ({"seeds": [1, None]}, "seeds entry 1 must be a whole number from -1 to 18446744073709551615, not null"),
        ({"seeds": [2**64]}, "seeds entry 0 must be a whole number from -1 to 18446744073709551615"),
        ({"prompts": [], "prompt": None}, "prompts must hold 1 to 8 entries, not 0"),
        ({"prompts": ["a", 3], "prompt": None}, "prompts entry 1 must be a string, not 3"),
        ({"prompts": ["x" * 10_001], "prompt": None}, "prompts entry 0 must have at most 10000 characters"),
        ({"prompts": ["a\0"], "prompt": None}, "prompts entry 0 holds a NUL"),
        ({"prompts": ["a"]}, "prompt and prompts are both given: prompts is one for each picture, prompt one for all"),
        ({"seeds": [1, 2], "seed": 1}, "seed and seeds are both given: seeds is one for each picture"),
        ({"seeds": [1, 2], "num_images": 3}, "seeds holds 2, num_images is 3: each picture has one of each"),
        ({"seeds": [1, 2], "num_images": 1}, "seeds holds 2, num_images is 1: each picture has one of each"),
        (
            {"prompts": ["a"] * 3, "prompt": None, "seeds": [1, 2]},
            "prompts holds 3, seeds holds 2, num_images is 3: each picture has one of each",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_a_sentence(fields, said):
    message = problem(**fields)
    assert message.startswith(said)
    assert "required" not in message


def test_the_limit_on_work_counts_every_picture_of_a_list():
    big = {"width": 1024, "height": 1024, "num_inference_steps": 50}
    assert validate_request({**GOOD, **big, "seeds": [1] * 5}).num_images == 5
    assert "must be at most 268435456" in problem(**big, seeds=[1] * 6)
    assert "must be at most 268435456" in problem(**big, prompt=None, prompts=["a"] * 6)


@pytest.mark.parametrize("seed", [-2, 2**64, 1.5, "1", True])
def test_row_8_seed_states_its_range(seed):
    assert "seed must be a whole number from -1 to 18446744073709551615" in problem(seed=seed)


def test_the_largest_seed_is_kept():
    assert validate_request({**GOOD, "seed": 2**64 - 1}).seed == 2**64 - 1


@pytest.mark.parametrize("scheduler", [None, "ULER", "", 3])
def test_row_9_scheduler_lists_the_names(scheduler):
    assert "PNDM, KLMS, DDIM, K_EULER, K_EULER_ANCESTRAL" in problem(scheduler=scheduler)


@pytest.mark.parametrize("loras", [{}, "name", 1])
def test_row_10_loras_is_a_list(loras):
    assert "loras must be a list" in problem(loras=loras)


@pytest.mark.parametrize("loras", [None, []])
def test_no_loras(loras):
    request = validate_request({**GOOD, "loras": loras})
    assert (request.loras, request.loras_requested, request.warnings) == ((), False, ())


def test_row_10_number_of_loras():
    assert "at most 32 entries" in problem(loras=["a"] * 33)


def test_a_reference_is_bounded_before_anything_looks_at_it():
    assert validate_request({**GOOD, "loras": ["x" * 4096]}).loras[0].reference == "x" * 4096
    message = problem(loras=["x://a:b" + "//" * 64_000, "good", {"url": "\ud800" * 4097}, {"name": "n" * 4097}])
    assert message == "loras hold a reference of more than 4096 characters in entry 0, 2, 3"


MALFORMED = [42, {}, None, {"path": None}, {"path": 3}, [], {"name": 3}, {"path": "a", "name": 3}, {"name": "?!"}]
BAD_SCALES = [math.nan, math.inf, "0.8", True, 10**400, None, {"unet": "1"}, {"vae": 1}, {"unet": math.nan}]


@pytest.mark.parametrize("entry", [*MALFORMED, *({"path": "x", "scale": scale} for scale in BAD_SCALES)])
def test_row_11_malformed_entries_are_skipped_and_named(entry):
    request = validate_request({**GOOD, "loras": ["good", entry]})
    assert [spec.reference for spec in request.loras] == ["good"]
    assert len(request.warnings) == 1
    assert request.warnings[0].startswith("loras[1] was skipped: it")
    assert request.loras_requested


@pytest.mark.parametrize("scale", [100.5, -101, 1e30, 1e300, 3.5e38, 10**400, math.nan, {"text_encoder": -1e30}])
def test_a_scale_out_of_range_is_a_skipped_entry_that_says_so(scale):
    request = validate_request({**GOOD, "loras": [{"path": "a", "scale": scale}]})
    assert request.loras == ()
    assert "must lie between -100 and 100" in request.warnings[0]


def test_the_largest_scales_are_taken():
    specs = validate_request({**GOOD, "loras": [{"path": "a", "scale": 100}, {"path": "a", "scale": -100.0}]}).loras
    assert [spec.scale.unet for spec in specs] == [100.0, -100.0]


@pytest.mark.parametrize(
    ("entry", "reference", "name"),
    [
        ({"path": None, "url": "https://a/b"}, "https://a/b", ""),
        ({"path": "", "url": "https://a/b"}, "https://a/b", ""),
        ({"path": "", "url": None, "source": "c"}, "c", ""),
        ({"path": "a", "url": "https://a/b"}, "a", ""),
        ({"path": ""}, "", ""),
        ({"path": "a", "name": None}, "a", ""),
        ({"path": "a", "name": ""}, "a", ""),
        ({"path": "user/repo", "name": "my style"}, "user/repo", "my_style"),
        ({"url": "https://a/b", "name": "../../etc/x:y.safetensors"}, "https://a/b", "etc_x_y.safetensors"),
        ({"name": "my style"}, "my_style", "my_style"),
        ({"name": "user/repo"}, "user_repo", "user_repo"),
        ({"path": None, "name": "https://a/b"}, "https_a_b", "https_a_b"),
    ],
)
def test_the_reference_and_the_name_of_an_entry(entry, reference, name):
    request = validate_request({**GOOD, "loras": [entry]})
    assert request.loras == (LoraSpec(reference, name=name),)
    assert request.warnings == ()


def test_row_12_13_scales_and_repeats_are_kept():
    request = validate_request(
        {**GOOD, "loras": [{"path": "a", "scale": -1}, {"url": "a", "scale": 0}, {"source": "a"}, "a"]}
    )
    assert [spec.scale.unet for spec in request.loras] == [-1.0, 0.0, 1.0, 1.0]
    assert request.loras[1].scale.is_zero
    assert [spec.index for spec in request.loras] == [0, 1, 2, 3]


def test_a_scale_per_part_of_the_model():
    spec = validate_request({**GOOD, "loras": [{"path": "a", "scale": {"unet": 0.8, "text_encoder": 0}}]}).loras[0]
    assert spec.scale == LoraScale(0.8, 0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "span"),
    [
        ({}, LoraSpan(0.0, 1.0)),
        ({"start": None, "end": None}, LoraSpan(0.0, 1.0)),
        ({"end": 0.6}, LoraSpan(0.0, 0.6)),
        ({"start": 0, "end": 1}, LoraSpan(0.0, 1.0)),
        ({"start": 0.25}, LoraSpan(0.25, 1.0)),
    ],
)
def test_the_steps_at_which_a_lora_acts(given, span):
    request = validate_request({**GOOD, "loras": [{"path": "a", **given}]})
    assert request.loras[0].span == span
    assert request.warnings == ()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"start": -0.1}, "its start is -0.1 and must lie between 0 and 1"),
        ({"end": 60}, "its end is 60 and must lie between 0 and 1"),
        ({"end": math.nan}, "its end is nan and must lie between 0 and 1"),
        ({"end": 10**400}, "its end is "),
        ({"start": 0.6, "end": 0.6}, "its start is 0.6 and must lie below its end, which is 0.6"),
        ({"start": 1}, "its start is 1 and must lie below its end, which is 1"),
        ({"end": 0}, "its start is 0 and must lie below its end, which is 0"),
        ({"start": "0.5"}, "its start is a string, not a number"),
        ({"end": True}, "its end is a boolean, not a number"),
    ],
)
def test_steps_that_cannot_be_are_a_skipped_entry_that_says_so(given, sentence):
    request = validate_request({**GOOD, "loras": [{"path": "a", **given}]})
    assert request.loras == ()
    assert request.warnings[0].startswith(f"loras[0] was skipped: {sentence}")


def test_an_unknown_key_of_an_entry_is_a_warning():
    request = validate_request({**GOOD, "loras": [{"path": "a", "weight": 0.5}]})
    assert request.warnings == ("loras[0]: ignored unknown 'weight'; known are path, scale, name, start and end",)


@pytest.mark.parametrize("reference", ["", "..", "../x", "a\0b", "\\", "x" * 300])
def test_row_14_the_form_of_a_reference_is_not_the_schema_s_business(reference):
    assert validate_request({**GOOD, "loras": [reference]}).loras[0].reference == reference


def test_every_problem_is_reported_at_once():
    message = problem(prompt="", width=1, height="x", seed=-2, num_images=9, scheduler="?", loras={}, other=1)
    for name in ("width", "height", "seed", "num_images", "scheduler", "loras", "'other'"):
        assert name in message


def test_requests_for_runpods_own_worker_are_accepted():
    request = validate_request(
        {
            **GOOD,
            "image_url": "https://example.com/a.png",
            "strength": 0.5,
            "refiner_inference_steps": 50,
            "high_noise_frac": 0.8,
            "negative_prompt": None,
            "seed": None,
        }
    )
    assert (request.image_url, request.strength, request.negative_prompt) == ("https://example.com/a.png", 0.5, None)
    assert [warning.split()[0] for warning in request.warnings] == ["refiner_inference_steps", "high_noise_frac"]


@pytest.mark.parametrize("field", ["image", "image_url"])
def test_a_picture_is_a_url_or_a_data_uri(field):
    for good in ("https://a/b.png", "data:image/png;base64,AAAA", "DATA:;base64,", "data:a/b;name=c.png;base64,A A"):
        assert validate_request({**GOOD, field: good}).pictures == {"image_url": (field, good)}
    for bad in ("data:", "data:image/png,AAAA", "data:image/png;base64 ,AAAA", "data:" + "a" * 201 + ";base64,A"):
        assert problem(**{field: bad}) == f"{field} must be a data URI in base64 (data:image/png;base64,...)"
    assert problem(**{field: "iVBORw0KGgo="}).startswith(f"{field} must be an http or https URL or a data URI")


def test_what_a_mask_needs():
    mask, image = {"mask": "https://a/b.png"}, {"image": "https://a/c.png"}
    assert problem(**mask) == "mask needs image_url, the picture that it is for"
    assert problem(extend={"left": 8}) == "extend needs image_url, the picture that it is for"
    assert validate_request({**GOOD, "extend": {"left": 0}}).extend is None
    assert validate_request({**GOOD, **mask, **image}).warnings == ()
    unused = {"invert_mask": True, "inpaint_full_res": True, "mask_blur": 1, "inpaint_padding": 4}
    assert [line.split()[0] for line in validate_request({**GOOD, **image, **unused}).warnings] == [
        *("invert_mask", "inpaint_full_res", "mask_blur")
    ]
    assert validate_request({**GOOD, **image, **mask, "inpaint_padding": 4}).warnings == (
        "inpaint_padding has no effect without inpaint_full_res",
    )


def test_a_form_that_sends_every_field_hears_nothing_of_masks():
    untouched = {"mask_blur": 4, "invert_mask": False, "inpaint_full_res": False, "inpaint_padding": 32}
    assert validate_request({**GOOD, **untouched, "mask_url": "", "extend": {}}).warnings == ()


@pytest.mark.parametrize(
    ("fields", "strength"),
    [
        ({}, 0.3),
        ({"strength": None}, 0.3),
        ({"mask": "https://a/b.png"}, 0.75),
        ({"extend": {"left": 8}}, 0.9),
        ({"mask_url": "https://a/b.png", "extend": {"left": 8}}, 0.9),
        ({"mask": "https://a/b.png", "strength": 0}, 0.0),
        ({"mask": "", "extend": {}}, 0.3),
    ],
)
def test_how_much_is_redrawn_when_nothing_is_said(fields, strength):
    assert validate_request({**GOOD, "image_url": "https://a/c.png", **fields}).denoising_strength == strength


def test_an_extension_adds_to_the_answer_s_size():
    fields = {**GOOD, "image": "https://a/b.png", "width": 512, "height": 768, "extend": {"left": 64, "bottom": 128}}
    request = validate_request(fields)
    assert (request.width, request.height, request.extend) == (576, 896, Extend(left=64, bottom=128))
    assert validate_request({**fields, "extend": {"right": 1536}}).width == 2048
    assert problem(**{**fields, "extend": {"right": 1544}}) == "width with extend is 2056 and must be at most 2048"
    assert "height with extend is 2816" in problem(**{**fields, "extend": {"top": 2048}})
    # Work is counted for what is drawn.
    work = {**fields, "extend": {"right": 512}, "num_inference_steps": 200, "num_images": 2}
    assert "(1024 x 768 x 180) x 2 = 283115520 and" in problem(**work)


def test_an_extension_does_not_go_with_the_full_resolution():
    fields = {"image": "https://a/b.png", "mask": "https://a/c.png", "inpaint_full_res": True, "extend": {"top": 8}}
    assert problem(**fields).startswith("extend and inpaint_full_res do not go together")


@pytest.mark.parametrize(
    ("extend", "says"),
    [
        ([8], "extend must be an object with left, top, right, bottom, not a list"),
        ({"left": 8, "above": 8}, "extend has the unknown key 'above'; known are left, top, right, bottom"),
        ({"left": 12}, "extend.left must be a whole number from 0 to 2048 and a multiple of 8, not 12"),
        ({"top": True}, "extend.top must be a whole number"),
        ({"top": -8}, "extend.top must be a whole number"),
    ],
)
def test_an_extension_is_in_whole_latents(extend, says):
    assert problem(image="https://a/b.png", extend=extend).startswith(says)


def test_a_picture_is_given_once():
    both = {"image": "https://a/b.png", "image_url": "https://a/b.png"}
    assert problem(**both) == "image_url and image mean the same: give one of them"
    assert validate_request({**GOOD, **both, "image": ""}).pictures == {"image_url": ("image_url", "https://a/b.png")}


def test_image_to_image():
    assert "at least 1 with image" in problem(image="data:;base64,", num_inference_steps=2, strength=0.3)
    assert "image_url must be an http" in problem(image_url="file:///etc/passwd")
    assert "secret" not in problem(image_url="ftp://user:secret@host/x")
    assert "at least 1" in problem(image_url="https://a/b.png", num_inference_steps=2, strength=0.3)
    assert "strength must be a number from 0 to 1" in problem(strength=-0.1)
    assert validate_request({**GOOD, "strength": 0.5}).warnings == ("strength has no effect without image_url",)


@pytest.mark.parametrize("strength", [0, 0.0, 1, 1.0])
def test_both_ends_of_strength(strength):
    fields = {"image_url": "https://a/b.png", "num_inference_steps": 1, "strength": strength}
    request = validate_request({**GOOD, **fields})
    assert (request.strength, type(request.strength)) == (strength, float)


def test_an_empty_image_url_is_none():
    request = validate_request({**GOOD, "image_url": "", "strength": 0.01, "num_inference_steps": 1})
    assert request.image_url is None
    assert request.warnings == ("strength has no effect without image_url",)


@pytest.mark.parametrize(
    ("field", "bad"), [("output_format", "gif"), ("output_quality", 0), ("output_quality", True), ("preview", 1)]
)
def test_output_fields(field, bad):
    assert problem(**{field: bad}).startswith(f"{field} must be")


def test_the_sdk_s_validator_reads_the_schema():
    nulls = {name: None for name, field in FIELDS.items() if field.check(None) is None}
    result = validate({**nulls, **GOOD, "guidance_scale": 7}, INPUT_SCHEMA)
    assert result["validated_input"] == {
        **{name: rules["default"] for name, rules in INPUT_SCHEMA.items() if not rules["required"]},
        **GOOD,
        "guidance_scale": 7.0,
    }
    assert len(validate({"loras": ["a"] * 33, "image_url": "ftp://a", "other": 1}, INPUT_SCHEMA)["errors"]) == 3


def test_the_whole_request_is_bounded():
    assert "more than 2000000 characters" in problem(prompt="x" * 2_000_001)
    assert "more than 2000000 characters" in problem(**{f"{index:x}": {} for index in range(400_000)})
    assert "image_url must be a data URI in base64" in problem(image_url="data:" + "x" * 3_000_000)
    assert "image_url must have at most 4096" in problem(image_url="http://" + "x" * 4_096)
    largest = "data:;base64," + "A" * (32 * 2**20 // 3 * 4)
    assert validate_request({**GOOD, "image": largest}).pictures == {"image_url": ("image", largest)}
    assert "image must hold at most 33554432 bytes" in problem(image=largest + "A" * 2_000_000)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "'deep' is not an input field" in problem(deep=deep)


def test_checking_a_large_request_is_linear():
    half = {"path": "\ud800" * 2000, **{f"{index:05}": [] for index in range(40_000)}}
    start = time.process_time()
    problem(loras=[half, "//:@" * 250_000], **{f"field{index}": None for index in range(40_000)})
    assert time.process_time() - start < 5


def test_validation_needs_no_torch():
    code = "import schemas, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_was_given_is_known_from_what_was_left_out():
    assert validate_request({"prompt": "a", "seed": None, "num_inference_steps": 28}).given == {
        "prompt",
        "num_inference_steps",
    }
