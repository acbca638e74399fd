"""Which of a request's LoRAs are merged at which step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from sdxl_worker.job_run import JobRun
from sdxl_worker.lora.engine import AppliedLora, LoraEngine, layers_of
from sdxl_worker.lora.keys import COMPONENTS, UNET
from sdxl_worker.lora.ready import ReadyLora


class LoraSchedule:
    """The LoRAs of one render, each at the steps of its span.

    The prompts are encoded before the first step, with the LoRAs that act there: where one begins or ends later, only
    weights of the UNet change. Where all LoRAs act at every step, this does nothing beside entering `engine.applied`.
    """

    def __init__(self, engine: LoraEngine, loras: Sequence[ReadyLora], run: JobRun) -> None:
        """Merging between two steps counts as `run`'s "applying_loras"."""
        self._engine, self._run = engine, run
        self._loras = [(lora.parsed, lora.spec.scale) for lora in loras]
        self._spans = [lora.spec.span for lora in loras]
        self._merged = self._acting(0.0)
        self._acted = self._merged
        self._whole: list[AppliedLora] | None = None

    @property
    def before_step(self) -> Callable[[float], bool] | None:
        """Makes sure, before a step, that its LoRAs are merged; takes what render's `before_step` gets.

        It says whether it changed weights. None where nothing ever changes. Raises LoraIncompatible and RestoreFailed;
        `merged` then puts all back.
        """
        return None if all(span.is_whole for span in self._spans) else self._before_step

    def sent_ahead(self) -> AbstractContextManager[None]:
        """Inside, what the first step's LoRAs need is on its way to the device, which another job may still use."""
        return self._engine.sent_ahead(self._those(self._merged))

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the LoRAs of the first step are merged; on the way out every weight has its pristine bits again.

        Raises AssetFileError before a weight is touched, RestoreFailed on the way out.
        """
        if self.before_step is not None:
            # What the later steps take for good is there before the first one: none of them can fail for that.
            self._engine.reserve(self._loras)
        with self._engine.applied(self._those(self._merged)) as applied:
            self._whole = applied if self.before_step is None else None
            yield

    @property
    def applied(self) -> list[AppliedLora]:
        """What each LoRA did, to be asked for after the render."""
        return [self._result(index) for index in range(len(self._loras))] if self._whole is None else self._whole

    def _before_step(self, done: float) -> bool:
        acting = self._acting(done)
        if acting == self._merged:
            return False
        switched = [now != before for now, before in zip(acting, self._merged, strict=True)]
        with self._run.measure("applying_loras"):
            self._engine.reapply_unet(self._those(acting), switched=self._those(switched))
        self._merged = acting
        self._acted = [now or before for now, before in zip(acting, self._acted, strict=True)]
        return True

    def _acting(self, done: float) -> list[bool]:
        return [span.covers(done) for span in self._spans]

    def _those(self, chosen: Sequence[bool]) -> list:
        return [lora for lora, is_chosen in zip(self._loras, chosen, strict=True) if is_chosen]

    def _result(self, index: int) -> AppliedLora:
        lora = self._loras[index]
        if not self._acted[index]:
            note = "no step lies between its start and its end, so it had no effect"
            return AppliedLora(0, (*lora[0].warnings, note))
        from_start = self._spans[index].covers(0.0)
        layers = layers_of(lora, COMPONENTS if from_start else (UNET,))
        if layers or not layers_of(lora):
            return AppliedLora(layers, lora[0].warnings)
        note = "it changes text encoders only, and the prompts are encoded before its start, so it had no effect"
        return AppliedLora(0, (*lora[0].warnings, note))
