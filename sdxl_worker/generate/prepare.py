"""A request made ready: what it names is fetched, read and checked before the device is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_worker import prompts
from sdxl_worker.errors import InvalidRequest
from sdxl_worker.generate import prediction
from sdxl_worker.generate.infotext import Used, image_seed
from sdxl_worker.generate.input_image import fetch_inputs
from sdxl_worker.generate.modes import Inputs, check_model
from sdxl_worker.generate.settle import settle
from sdxl_worker.lora.ready import ReadyLora, make_ready
from sdxl_worker.prompts.embeddings import Embedding, PromptEmbeddings
from sdxl_worker.prompts.ready import make_ready as make_embeddings_ready
from sdxl_worker.prompts.vectors import widths_of
from sdxl_worker.request.refinement import refinement_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from sdxl_worker.assets.store import AssetStore
    from sdxl_worker.job_run import JobRun
    from sdxl_worker.lora.engine import AppliedLora, LoraEngine
    from sdxl_worker.request import GenerationRequest


@dataclass(frozen=True)
class Prepared:
    """All that rendering takes beside the pipeline; `used_by_prompt` are those of `embeddings` that each one names."""

    request: GenerationRequest
    inputs: Inputs
    loras: Sequence[ReadyLora]
    embeddings: PromptEmbeddings
    used_by_prompt: Sequence[Sequence[Embedding]]
    notes: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> Used:
        """What the pictures' text says."""
        return Used([lora.used for lora in self.loras], self.used_by_prompt)

    @property
    def used_embeddings(self) -> list[Embedding]:
        """Those that any of the prompts names."""
        used = {embedding for of_one in self.used_by_prompt for embedding in of_one}
        return [embedding for embedding in self.embeddings.embeddings if embedding in used]

    def facts(self, applied: Sequence[AppliedLora]) -> dict[str, Any]:
        """The answer's entries about what was drawn; `applied` says what each of the LoRAs did."""
        facts: dict[str, Any] = {"seed": self.request.seed}
        if self.request.num_images > 1:
            facts["seeds"] = [image_seed(self.request, index) for index in range(self.request.num_images)]
        if self.settings:
            facts["settings"] = dict(self.settings)
        if self.request.loras_requested:
            facts["loras"] = [lora.as_json(done) for lora, done in zip(self.loras, applied, strict=True)]
        if self.request.embeddings_requested or self.used_embeddings:
            facts["used_embeddings"] = [embedding.as_json() for embedding in self.used_embeddings]
        return facts

    def warnings(self, applied: Sequence[AppliedLora]) -> list[str]:
        """What to tell the caller, in the order in which the worker came upon it."""
        of_loras = [line for lora, done in zip(self.loras, applied, strict=True) for line in lora.warnings(done)]
        notes = self.embeddings.notes_on(self.used_embeddings)
        return [*self.request.warnings, *self.notes, *of_loras, *notes]


def prepare(
    request: GenerationRequest,
    pipeline: StableDiffusionXLPipeline,
    assets: AssetStore,
    engine: Callable[[], LoraEngine],
    run: JobRun,
) -> Prepared:
    """Fetch and read what `request` names; nothing of `pipeline` is changed, and `engine` is called only for LoRAs.

    Raises InvalidRequest, FetchError, AssetFileError and Cancelled.
    """
    check_model(pipeline, request)
    plan = refinement_of(request)
    if plan is not None and plan.is_alone and request.loras:
        raise InvalidRequest(
            "LoRAs do not reach the refiner, which alone redraws the picture where refiner_inference_steps is given; "
            "leave that out for the base model with the LoRAs"
        )
    if not request.embeddings:
        # As soon as it can be told; with embeddings only they say how long the prompts are.
        prompts.examined(pipeline, request)
    inputs = fetch_inputs(request, assets, run)
    loras = make_ready(request.loras, assets, engine, run) if request.loras else []
    settled = settle(request, loras)
    request = settled.request
    embeddings = _embeddings(request, pipeline, assets, loras, run)
    notes = [
        *prompts.examined(pipeline, request, embeddings),
        *prediction.notes_on_sampler(pipeline.scheduler.config, request),
        *prediction.notes_on_loras(pipeline.scheduler.config, loras),
        *settled.warnings,
    ]
    alone = [dataclasses.replace(request, prompts=(prompt,)) for prompt in request.prompts] or [request]
    used = [embeddings.used_by(one, prompts.tokenizers_of(pipeline)) for one in alone]
    return Prepared(request, inputs, loras, embeddings, used, notes, settled.settings)


def inspected(
    request: GenerationRequest, pipeline: StableDiffusionXLPipeline, assets: AssetStore, run: JobRun
) -> dict[str, Any]:
    """The answer to `inspect_prompt`: how the prompts are read, with the request's own embeddings; nothing is drawn.

    Raises like `prepare`.
    """
    embeddings = _embeddings(request, pipeline, assets, (), run)
    warnings = [*request.warnings, *prompts.examined(pipeline, request, embeddings)]
    answer = prompts.inspection(request, prompts.tokenizers_of(pipeline), embeddings)
    return {**answer, "warnings": warnings} if warnings else answer


def _embeddings(
    request: GenerationRequest,
    pipeline: StableDiffusionXLPipeline,
    assets: AssetStore,
    loras: Sequence[ReadyLora],
    run: JobRun,
) -> PromptEmbeddings:
    """The request's own embeddings, and then those that its LoRA files hold."""
    ready = make_embeddings_ready(request.embeddings, assets, widths_of(pipeline), run)
    return PromptEmbeddings([*ready, *(embedding for lora in loras for embedding in lora.embeddings)])
