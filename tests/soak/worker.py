"""The worker of a soak, in a process of its own: handler.py with faults, and its weights' hash first and last."""

from __future__ import annotations

import sys

import handler
from tests.integration.hasty_worker import hurry
from tests.soak import faults
from tests.support.lora_files import weight_hash

FIRST, LAST = "soak: weights at first", "soak: weights at last"


def main() -> int:
    """Run until RunPod says SIGTERM."""
    hurry()
    worker = handler.process.worker
    get_ready, close = worker.get_ready, worker.close

    def ready(began: float | None = None) -> None:
        get_ready(began)
        faults.install(worker.pipeline.unet)
        _tell(FIRST)

    def closed() -> None:
        _tell(LAST)
        close()

    def _tell(when: str) -> None:
        assert worker.resident.refiner is not None
        found = " ".join(weight_hash(pipeline) for pipeline in (worker.pipeline, worker.resident.refiner.pipeline))
        sys.stdout.write(f"{when}: {found}\n")
        sys.stdout.flush()

    worker.get_ready, worker.close = ready, closed  # type: ignore[method-assign]
    return handler.main()


if __name__ == "__main__":
    sys.exit(main())
