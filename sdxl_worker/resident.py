"""What stays in memory as long as the process: the pipeline, its refiner, its LoRA engine, its hash."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from sdxl_worker import prompts
from sdxl_worker.generate.previews import Previews
from sdxl_worker.lora.engine import LoraEngine
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from sdxl_worker.generate.head_start import HeadStart
    from sdxl_worker.generate.refiner import Refiner


class Resident:
    """Loads the pipeline when it is first asked for; the LoRA engine only when the first LoRA is."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._refiner: Refiner | None = None
        self._model_hash: Future[str] | None = None
        self.head_start: HeadStart | None = None
        self._attention = ""
        self._previews = Previews()
        self._engines: weakref.WeakKeyDictionary[Any, LoraEngine] = weakref.WeakKeyDictionary()

    @property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """The base model; raises ModelUnavailable."""
        with self._lock:
            if self._pipeline is None:
                from sdxl_worker.generate.load import load_pipeline
                from sdxl_worker.generate.model_hash import start_hashing
                from sdxl_worker.generate.preview_vae import load_preview_vae
                from sdxl_worker.generate.refiner import load_refiner

                # For one time: what could not be loaded is read and hashed anew when it is asked for again.
                head_start, self.head_start = self.head_start, None
                pipeline, model = load_pipeline(self._settings)
                if self._settings.attention:
                    from sdxl_worker.generate import attention

                    self._attention = attention.usable(self._settings.attention, pipeline.device, pipeline.dtype)
                if self._settings.compile:
                    from sdxl_worker.generate import compiled

                    compiled.compile_in_place(pipeline, kernel=self._attention)
                # Copied now: no render may use the originals meanwhile.
                prompts.tokenizers_of(pipeline)
                self._previews = Previews(load_preview_vae(self._settings, pipeline))
                self.use(pipeline, load_refiner(self._settings, pipeline))
                early = head_start.hash_of(model) if head_start else None
                self._model_hash = early or start_hashing(model, pipeline)
                if self._settings.compile:
                    with self.attention():
                        compiled.warm_up(pipeline)
            assert self._pipeline is not None
            return self._pipeline

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Around what draws: inside, attention takes the kernel of ATTENTION."""
        if not self._attention:
            yield
            return
        from sdxl_worker.generate import attention

        with attention.chosen(self._attention):
            yield

    @property
    def refiner(self) -> Refiner | None:
        """None where REFINER_ID is empty, and before the pipeline is loaded."""
        return self._refiner

    @property
    def previews(self) -> Previews:
        """What makes previews of the latents of a run."""
        return self._previews

    @property
    def model_hash(self) -> str:
        """Waits for it; empty where the base model has none."""
        return self._model_hash.result() if self._model_hash else ""

    def use(self, pipeline: StableDiffusionXLPipeline, refiner: Refiner | None = None) -> None:
        """Take these, which are loaded already."""
        with self._lock:
            self._pipeline, self._refiner = pipeline, refiner

    def engine_of(self, pipeline: StableDiffusionXLPipeline) -> LoraEngine:
        """The one LoRA engine of `pipeline`."""
        with self._lock:
            if pipeline not in self._engines:
                cache_bytes, kernel = int(self._settings.lora_ram_cache_gb * 2**30), bool(self._settings.lora_kernel)
                self._engines[pipeline] = LoraEngine(pipeline, cache_bytes, kernel=kernel)
            return self._engines[pipeline]

    def close(self) -> None:
        """Let go of everything; the next job would load it again."""
        with self._lock:
            self._pipeline = self._refiner = self._model_hash = None
            self._previews = Previews()
            self._engines.clear()
        gc.collect()
