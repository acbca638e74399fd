"""The job's input, unknown JSON -> a GenerationRequest with nothing left to doubt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from sdxl_worker.data_uris import is_data_uri
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.request import picture_rules, work
from sdxl_worker.request.embedding_entries import parse_embedding_entries
from sdxl_worker.request.fields import FIELDS, PER_PICTURE, PICTURE_FIELDS, GenerationRequest
from sdxl_worker.request.lora_entries import parse_lora_entries
from sdxl_worker.request.refinement import plan, refiner_problems, unused
from sdxl_worker.request.sampling import resolve, sampling_problems, sampling_warnings
from sdxl_worker.request.second_pass import hires_problems
from sdxl_worker.text import shown

# Every field has its own, smaller bound: this one is for what is not a field.
MAX_INPUT_CHARACTERS = 2_000_000
# More would only be the same mistake again, such as a file pasted in as fields.
MAX_PROBLEMS = 40

_TO_A_SAMPLER = frozenset({"schedule_type", "timesteps", "eta"})

# In the RunPod SDK's format (runpod.serverless.utils.rp_validator).
INPUT_SCHEMA: dict[str, dict[str, Any]] = {name: field.as_schema() for name, field in FIELDS.items()}


def validate_request(raw: Any, refiner: str = "") -> GenerationRequest:
    """The request in `raw` with every default filled in; a missing seed is drawn at random.

    `refiner` is the name of the worker's refiner, empty where it has none. Malformed entries of `loras` and
    `embeddings` are skipped and named in `warnings`. Raises InvalidRequest, naming every problem.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest(f"input must be an object with at least a prompt, not {shown(raw)}")
    if is_larger(raw, MAX_INPUT_CHARACTERS):
        raise InvalidRequest(f"input holds more than {MAX_INPUT_CHARACTERS} characters")
    problems = _field_problems(raw)
    values = picture_rules.resolved({**{name: field.default for name, field in FIELDS.items()}, **raw}, problems)
    values["num_images"] = raw.get("num_images", _number_of_pictures(values, problems))
    given = frozenset(name for name, value in raw.items() if value is not None)
    sampling = resolve(values, given, problems)
    values = {**sampling.values, "given": sampling.given, "refiner": refiner}
    undecided = {*problems, *_undecided(values, sampling.given)}
    combined = [*combined_problems(values, undecided), *_per_picture_problems(values, problems)]
    sentences = [*problems.values(), *sampling.problems, *combined]
    if sentences:
        raise InvalidRequest("; ".join(sentences[:MAX_PROBLEMS]))
    specs, lora_warnings = parse_lora_entries(values["loras"] or ())
    embeddings, embedding_warnings = parse_embedding_entries(values["embeddings"] or ())
    read = {name: field.read(values[name]) for name, field in FIELDS.items()}
    if read["seeds"]:
        read["seed"] = read["seeds"][0]
    return GenerationRequest(
        **{**read, "loras": specs, "embeddings": embeddings},
        loras_requested=bool(values["loras"]),
        embeddings_requested=bool(values["embeddings"]),
        given=sampling.given,
        refiner=refiner,
        values=values,
        warnings=lora_warnings + embedding_warnings + sampling.warnings + _ignored(values, raw),
    )


def is_larger(value: Any, limit: int) -> bool:
    """True when a JSON value holds more characters than `limit`, not counting data URIs: an own bound is theirs.

    Each value and key counts as one more. Depth does not matter: nothing here calls itself.
    """
    size, waiting = 0, [value]
    while waiting and size <= limit:
        entry = waiting.pop()
        size += 1
        if isinstance(entry, str):
            size += 0 if is_data_uri(entry) else len(entry)
        elif isinstance(entry, dict):
            waiting += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list):
            waiting += entry
    return size > limit


def _field_problems(raw: Mapping[str, Any]) -> dict[str, str]:
    """A sentence per bad field.

    The SDK's own rp_validator is not asked: all that it would find is found here, and it lets `true` pass as a number,
    skips a constraint when the value has the default's type, and raises on an integer that no float can hold.
    """
    problems = {}
    for name, field in FIELDS.items():
        missing = [f"{name} is required"] if field.required else []
        if sentences := field.check.sentences(name, raw[name]) if name in raw else missing:
            problems[name] = "; ".join(sentences)
    unknown = (name for name in raw if name not in FIELDS)
    return problems | {name: f"{shown(name)} is not an input field" for name in islice(unknown, MAX_PROBLEMS)}


def _undecided(values: Mapping[str, Any], given: Collection[str]) -> frozenset[str]:
    """The fields that a LoRA may choose (generate.settle): what hangs on them is looked at when it has.

    The sampler only where the request has something to say to it, so that as much as can be is refused at once.
    """
    prompts = [values["prompt"], *(values["prompts"] if isinstance(values["prompts"], list) else ())]
    tags = any(isinstance(prompt, str) and "<lora:" in prompt.lower() for prompt in prompts)
    if not tags and not values["loras"]:
        return frozenset()
    choices = {"num_inference_steps"} | ({"scheduler"} if _TO_A_SAMPLER & set(given) else set())
    return frozenset(choices - set(given))


def combined_problems(values: Mapping[str, Any], bad: Collection[str] = ()) -> list[str]:
    """What is wrong with fields that are each good on their own; `bad` are those that are not."""
    problems = sampling_problems(values, bad)
    by_base_model = True
    if not {*work.FIELDS, *PICTURE_FIELDS["image_url"]} & set(bad):
        refinement = plan(values)
        by_base_model = refinement is None or not refinement.is_alone
        problems += refiner_problems(values, refinement)
        to_image = picture_rules.starts_from_picture(values)
        problems += work.problems(values, to_image=to_image, refinement=refinement)
    problems += hires_problems(values, bad)
    return problems + picture_rules.problems(values, bad, by_base_model=by_base_model)


def _number_of_pictures(values: Mapping[str, Any], bad: Collection[str]) -> int:
    """How many a request draws that does not say so: as many as it has prompts or seeds, else one."""
    return max((len(values[name]) for name in PER_PICTURE if values[name] and name not in bad), default=1)


def _per_picture_problems(values: Mapping[str, Any], bad: Collection[str]) -> list[str]:
    """What is wrong with the lists that have an entry for each picture."""
    problems = []
    if not {"prompt", "prompts"} & set(bad):
        if values["prompt"] is None and not values["prompts"]:
            problems.append("prompt is required")
        if values["prompt"] and values["prompts"]:
            problems.append("prompt and prompts are both given: prompts is one for each picture, prompt one for all")
    if not {"seed", "seeds"} & set(bad) and values["seed"] not in (None, -1) and values["seeds"]:
        problems.append("seed and seeds are both given: seeds is one for each picture, seed the first one's")
    lengths = {name: len(values[name]) for name in PER_PICTURE if values[name] and name not in bad}
    if lengths and "num_images" not in bad:
        lengths["num_images"] = values["num_images"]
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {'is' if name == 'num_images' else 'holds'} {lengths[name]}" for name in lengths)
        problems.append(f"{said}: each picture has one of each")
    return problems


def _ignored(values: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[str, ...]:
    is_refined = plan(values) is not None
    ignored = picture_rules.ignored(values, raw, strength_counts=is_refined)
    return (*sampling_warnings(values), *unused(values), *ignored)
