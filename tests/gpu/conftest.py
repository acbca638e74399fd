"""A worker on the tiny model with its refiner, in half precision, on the CPU and on a GPU where there is one."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator

import pytest

from tests.gpu.tiny_worker import TinyWorker

CPU_AND_GPU = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="module", params=CPU_AND_GPU)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyWorker]:
    """One for the tests of a module, each of which leaves it as it was."""
    tiny = TinyWorker(request.param, tmp_path_factory.mktemp("loras"))
    # As in a worker that has started: each failure looks for garbage, and only in what is new.
    gc.collect()
    gc.freeze()
    yield tiny
    gc.unfreeze()
    tiny.worker.close()


@pytest.fixture(autouse=True)
def _texts_alone() -> Iterator[None]:
    """pytest keeps log records; what hangs on an error in one of them would count as memory in use."""

    def without_objects(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        record.msg, record.args, record.exc_info = text, None, None
        return True

    logger = logging.getLogger("sdxl_worker.worker")
    logger.addFilter(without_objects)
    yield
    logger.removeFilter(without_objects)
