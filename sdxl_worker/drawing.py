"""A prepared job on the device: its turn, the LoRAs merged in, its pictures, and everything put back."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from sdxl_worker.generate.prepare import Prepared
from sdxl_worker.job_run import Denoising, JobRun
from sdxl_worker.lora.engine import AppliedLora, LoraEngine
from sdxl_worker.lora.schedule import LoraSchedule
from sdxl_worker.resident import Resident
from sdxl_worker.serving.faults import Health

if TYPE_CHECKING:
    from sdxl_worker.generate.previews import Previews


def draw(
    prepared: Prepared, pipeline: Any, engine: LoraEngine | None, resident: Resident, health: Health, run: JobRun
) -> tuple[list[Image], list[AppliedLora]]:
    """Render on the device, with the LoRAs merged in; all that this takes is undone in reverse whatever happens.

    `engine` is None where there are no LoRAs.
    """
    from sdxl_worker.generate.render import render

    request = prepared.request
    on_step = functools.partial(_after_step, run, resident.previews if request.preview else None)
    loras = LoraSchedule(engine, prepared.loras, run) if engine else None
    with ExitStack() as stack:
        ahead = stack.enter_context(ExitStack())
        if loras:
            ahead.enter_context(loras.sent_ahead())
        stack.enter_context(run.device())
        stack.enter_context(health.watch())
        # After a failure, before memory is freed and the device passed on.
        stack.callback(ahead.close)
        stack.enter_context(resident.attention())
        # Before the LoRAs: the refiner, which gets none, shares the second text encoder.
        refiner = resident.refiner
        refining = refiner.ready_for(request, prepared.embeddings) if refiner else None
        if loras:
            stack.enter_context(run.timed(loras.merged(), "applying_loras", "restoring"))
        # The files' copies have done their work, and rendering may need their memory.
        ahead.close()
        stack.enter_context(run.stage("denoising"))
        stack.enter_context(health.rendering())
        pictures = render(
            pipeline,
            request,
            inputs=prepared.inputs,
            on_step=on_step,
            before_step=loras.before_step if loras else None,
            embeddings=prepared.embeddings,
            refining=refining,
        )
        return pictures, loras.applied if loras else []


def _after_step(run: JobRun, previews: Previews | None, step: int, steps: int, latents: Any) -> None:
    run.check_stop()
    preview = functools.partial(previews.begin, latents) if previews else None
    run.progress.update(Denoising(step, steps, preview))
