"""What a few-step LoRA chooses for a request, and what it says to other choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_worker.errors import InvalidRequest
from sdxl_worker.few_step import named
from sdxl_worker.generate.settle import Settled, settle
from sdxl_worker.request import LoraScale, LoraSpec
from sdxl_worker.request.validation import validate_request

LIGHTNING, LCM, TCD, DMD2 = "SDXL-Lightning, 4 steps", "LCM-LoRA", "TCD-LoRA", "DMD2"


def lora(kind: str, index: int = 0, scale: LoraScale | None = None) -> Any:
    spec = LoraSpec("x", scale or LoraScale(), index)
    return SimpleNamespace(spec=spec, file=SimpleNamespace(name=f"{index}.safetensors"), few_step=named(kind))


def settled(kind: str, **fields: Any) -> Settled:
    return settle(validate_request({"prompt": "a", "loras": ["x"], **fields}), [lora(kind)])


def used(found: Settled) -> dict[str, Any]:
    return {name: value for name, value in found.settings.items() if name not in ("lora", "kind", "chosen")}


def test_a_plain_lora_chooses_nothing() -> None:
    request = validate_request({"prompt": "a", "loras": ["x"]})
    found = settle(request, [lora("")])
    assert found == Settled(request)
    assert (found.request.scheduler, found.request.num_inference_steps) == ("K_EULER_ANCESTRAL", 28)


def test_what_is_left_out_is_chosen_and_said() -> None:
    found = settled(LIGHTNING)
    assert found.settings == {
        "lora": "0.safetensors",
        "kind": "SDXL-Lightning, 4 steps",
        "chosen": ["scheduler", "schedule_type", "num_inference_steps", "guidance_scale"],
        "scheduler": "K_EULER",
        "schedule_type": "sgm_uniform",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
    }
    assert {name: getattr(found.request, name) for name in used(found)} == used(found)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("kind", "given", "warning"),
    [
        (LIGHTNING, {"num_inference_steps": 28}, "num_inference_steps 4; drawn with num_inference_steps 28 "),
        (LIGHTNING, {"guidance_scale": 7}, "guidance_scale 0 to 1; drawn with guidance_scale 7 "),
        (LIGHTNING, {"scheduler": "DDIM"}, "scheduler K_EULER; drawn with scheduler DDIM "),
        (LIGHTNING, {"scheduler": "Euler Karras"}, "schedule_type sgm_uniform; drawn with schedule_type karras "),
        (LIGHTNING, {"scheduler": "LCM"}, "sgm_uniform; drawn with scheduler LCM and schedule_type automatic "),
        (
            LCM,
            {"num_inference_steps": 20, "guidance_scale": 5},
            "num_inference_steps 2 to 8 and guidance_scale 0 to 2; drawn with num_inference_steps 20 and "
            "guidance_scale 5 ",
        ),
        ("Hyper-SD CFG, 8 steps", {"guidance_scale": 1}, "guidance_scale 5 to 8; drawn with guidance_scale 1 "),
    ],
)
def test_what_is_given_stays_and_is_warned_about(kind: str, given: dict[str, Any], warning: str) -> None:
    found = settled(kind, **given)
    (sentence,) = found.warnings
    assert sentence.startswith(f"loras[0]: it is {kind}, which wants ")
    assert warning in sentence
    for name, value in given.items():
        if name != "scheduler":
            assert getattr(found.request, name) == value
        assert name not in found.settings["chosen"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (LIGHTNING, {"num_inference_steps": 4, "guidance_scale": 0, "scheduler": "Euler SGM Uniform"}),
        (LIGHTNING, {"schedule_type": "simple"}),
        (LCM, {"num_inference_steps": 8, "guidance_scale": 1.8}),
        ("Hyper-SD, 1 step", {"num_inference_steps": 4}),
    ],
)
def test_what_a_lora_is_made_for_is_not_warned_about(kind: str, given: dict[str, Any]) -> None:
    assert settled(kind, **given).warnings == ()


def test_the_schedule_of_another_sampler_is_chosen_where_it_has_one() -> None:
    assert settled(LIGHTNING, scheduler="DDIM").request.schedule_type == "sgm_uniform"
    assert settled(LIGHTNING, scheduler="LCM").request.schedule_type == "automatic"


def test_a_sampler_that_what_is_given_does_not_go_with_is_not_chosen() -> None:
    """LCM has at most 50 steps, and no schedules; the worker's own sampler draws both."""
    many, schedule = settled(LCM, num_inference_steps=60), settled(LCM, schedule_type="sgm_uniform")
    assert (many.request.scheduler, schedule.request.scheduler) == ("K_EULER_ANCESTRAL", "K_EULER_ANCESTRAL")
    assert "wants scheduler LCM" in many.warnings[0]
    assert "wants scheduler LCM" in schedule.warnings[0]


def test_a_schedule_that_only_the_chosen_sampler_has() -> None:
    assert settled(LIGHTNING, schedule_type="karras").request.scheduler == "K_EULER"
    with pytest.raises(InvalidRequest, match="scheduler K_EULER_ANCESTRAL takes schedule_type"):
        settled("", schedule_type="karras")


@pytest.mark.parametrize("given", [{"scheduler": "PNDM"}, {"scheduler": "Euler Karras"}, {"schedule_type": "normal"}])
def test_a_sampler_or_schedule_that_needs_more_steps_gets_them(given: dict[str, Any]) -> None:
    assert settled("Hyper-SD, 1 step", **given).request.num_inference_steps == 2


def test_a_lora_without_effect_on_the_unet_chooses_nothing() -> None:
    request = validate_request({"prompt": "a", "loras": ["x"]})
    for unet in (0.0, -1.0):
        assert settle(request, [lora(LIGHTNING, scale=LoraScale(unet, 1.0, 1.0))]).settings == {}


def test_of_two_the_first_one_chooses_and_a_warning_says_so() -> None:
    request = validate_request({"prompt": "a", "loras": ["x", "y", "z"]})
    found = settle(request, [lora("", 0), lora(LCM, 1), lora(LIGHTNING, 2)])
    assert found.request.scheduler == "LCM"
    assert found.settings["lora"] == "1.safetensors"
    (warning,) = found.warnings
    assert warning.startswith("loras[2]: it is SDXL-Lightning, 4 steps, and loras[1] is LCM-LoRA: two few-step LoRAs")


def test_a_negative_prompt_that_has_no_effect_any_more_is_named() -> None:
    assert settled(LIGHTNING, negative_prompt="blurry").warnings == (
        "negative_prompt has no effect: loras[0] is SDXL-Lightning, 4 steps, drawn without guidance",
    )
    assert settled("Hyper-SD CFG, 8 steps", negative_prompt="blurry").warnings == ()


def test_a_refiner_that_the_lora_does_not_reach_is_named() -> None:
    fields = {"prompt": "a", "loras": ["x"], "refiner_inference_steps": 10}
    (warning,) = settle(validate_request(fields, "refiner"), [lora(LIGHTNING)]).warnings
    assert warning.startswith("loras[0] is SDXL-Lightning, 4 steps and does not reach the refiner")
    assert settle(validate_request(fields), [lora(LIGHTNING)]).warnings == ()


def test_what_has_no_effect_is_told_by_what_is_chosen() -> None:
    assert settled(TCD, eta=0.5).request.warnings == ()
    assert settled(TCD, eta=0.5).request.eta == 0.5
    assert "eta" not in settled(LIGHTNING, eta=0.5).settings
    (eta,) = settled(LIGHTNING, eta=0.5).request.warnings
    assert eta.startswith("eta has no effect with scheduler K_EULER;")
    (rescale,) = settled(LIGHTNING, guidance_rescale=0.7).request.warnings
    assert rescale.startswith("guidance_rescale has no effect")


def test_timesteps_go_with_their_steps_and_sampler() -> None:
    assert settled(DMD2).request.timesteps == (999, 749, 499, 249)
    assert settled(DMD2, num_inference_steps=4).request.timesteps == (999, 749, 499, 249)
    assert settled(DMD2, num_inference_steps=8).request.timesteps is None
    assert settled(DMD2, scheduler="DDIM").request.timesteps is None
    own = settled(DMD2, timesteps=[999, 500])
    assert (own.request.timesteps, own.request.num_inference_steps) == ((999, 500), 2)
    assert "num_inference_steps 4; drawn with num_inference_steps 2" in own.warnings[0]
    low = settled(DMD2, image_url="https://example.com/a.png", strength=0.2).request
    assert (low.timesteps, low.num_inference_steps) == (None, 5)


BIG = {"width": 2048, "height": 2048, "num_images": 4}


def test_the_limit_on_work_is_that_of_the_chosen_steps() -> None:
    """2048 x 2048 x 4 pictures: 28 steps are 1.75 times what is allowed, 4 are a quarter."""
    assert settled(LIGHTNING, **BIG).request.num_inference_steps == 4
    for refused in ({}, {"num_inference_steps": 28}):
        with pytest.raises(InvalidRequest, match="must be at most 268435456"):
            settled("", **BIG, **refused)
    with pytest.raises(InvalidRequest, match="must be at most 268435456"):
        validate_request({"prompt": "a", **BIG})
    with pytest.raises(InvalidRequest, match="must be at most 268435456"):
        validate_request({"prompt": "a", **BIG, "loras": ["x"], "num_inference_steps": 28})


def test_image_to_image_gets_as_many_steps_as_its_strength_takes() -> None:
    picture = {"image_url": "https://example.com/a.png"}
    assert settled(LIGHTNING, **picture, strength=0.5).request.num_inference_steps == 4
    found = settled("SDXL-Lightning, 2 steps", **picture, strength=0.3)
    assert found.request.num_inference_steps == 4
    assert found.warnings == ()
    with pytest.raises(InvalidRequest, match="num_inference_steps x strength"):
        settled(LIGHTNING, **picture, strength=0.3, num_inference_steps=2)
