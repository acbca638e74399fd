"""RunPod's handler, under the names of the original worker: a job goes in, an answer comes out.

python handler.py --help
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import WorkerError
from sdxl_worker.memory import collector_paused
from sdxl_worker.sdk import import_sdk
from sdxl_worker.serving import launch
from sdxl_worker.serving.mode import Mode

if TYPE_CHECKING:
    from sdxl_worker.lora.engine import AppliedLora
    from sdxl_worker.lora.parsed import ParsedLora
    from sdxl_worker.request import LoraScale
    from sdxl_worker.serving.service import Service
    from sdxl_worker.settings import Settings
    from sdxl_worker.worker import Worker


class Process:
    """This process's worker and the SDK's view of it, made when first asked for.

    The SDK calls a function and the original's names are functions: something has to hold the one worker for them.
    It is here, and nowhere in the package. Until then nothing is imported: --help needs neither torch nor the SDK.
    """

    @functools.cached_property
    def settings(self) -> Settings:
        """Read from the environment; raises ValueError, naming the variable."""
        from sdxl_worker.settings import Settings

        return Settings.from_environment()

    @functools.cached_property
    def worker(self) -> Worker:
        """Made from the settings; raises ValueError, naming the variable."""
        settings = self.settings
        from sdxl_worker.worker import Worker

        return Worker(settings)

    @functools.cached_property
    def service(self) -> Service:
        """The job threads and the configuration for the SDK."""
        from sdxl_worker.serving.service import Service

        return Service(self.worker.start_run, self.worker.run, self.worker.settings.worker_concurrency)


process = Process()


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job, which can be stopped meanwhile; see Service.handle."""
    return await process.service.handle(job)


def generate_image(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job; see Worker.run. Never raises."""
    return process.worker.run(job)


def _load_loras(pipeline: Any, loras_config: Sequence[Any]) -> tuple[list[Path], list[LoraScale]]:
    """Local files and scales of a request's `loras` list; see Worker.load_loras."""
    return process.worker.load_loras(pipeline, loras_config)


def _apply_loras_to_pipeline(
    pipeline: Any, lora_paths: Sequence[Path | ParsedLora], lora_scales: Sequence[LoraScale | float]
) -> list[AppliedLora]:
    """Merge LoRAs into the weights; see Worker.apply_loras."""
    return process.worker.apply_loras(pipeline, lora_paths, lora_scales)


def _unload_loras_from_pipeline(pipeline: Any) -> None:
    """Put the pipeline's weights back, bit for bit; raises RestoreFailed."""
    process.worker.engine_of(pipeline).restore()


def main() -> int:
    """Start the worker the way the command line and the environment ask for; the exit status."""
    if launch.wants_help(sys.argv[1:]):
        sys.stdout.write(launch.help_text())
        return 0
    began = time.perf_counter()
    try:
        launch.check_environment()
        with collector_paused():
            head_start = launch.head_start(process.settings)
            import_sdk()
            worker = process.worker
            worker.resident.head_start = head_start
            arguments = launch.prepare(worker.settings)
        worker.mode = launch.mode_of(arguments)
        if launch.has_a_job(worker.mode, arguments):
            if worker.mode is Mode.LOCAL:
                launch.check_local_job(arguments)
            launch.keep_compiled_code(worker.settings)
            worker.get_ready(began)
    except (WorkerError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    try:
        launch.start(process.service.config, worker.checks())
    finally:
        # Last of all, after what the SDK says about a local run.
        sys.stdout.writelines(f"Saved {path}\n" for path in worker.saved)
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
