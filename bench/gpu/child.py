"""A process that measures: builds the pipeline of its group once, then measures what it is told to, line by line.

Lines of JSON go in on standard input ({"measure": "module:function", "options": {...}}) and come out on standard
output: {"ready": seconds} first, then {"result": {...}} for each. Whatever else is written goes to standard error. A
failure is answered with {"error": ..., "traceback": ...} and ends the process: after a CUDA error nothing here works
any more, and after another one the pipeline may be half changed. `bench.gpu.runner` starts a new one for the rest.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sdxl_worker.serving.launch import keep_compiled_code
from sdxl_worker.settings import Settings


def main() -> int:
    """Serve standard input until it ends; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--no-pipeline", action="store_true")
    parser.add_argument("--compiled-code", type=Path, help="where COMPILE=1 keeps it (default torch's own folder)")
    arguments = parser.parse_args()
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        answers.write(json.dumps(what, default=str) + "\n")
        answers.flush()

    try:
        started = time.perf_counter()
        if arguments.compiled_code:
            # As in handler.py, before torch chooses a folder.
            keep_compiled_code(Settings(compile=1, compile_cache_dir=arguments.compiled_code))
        pipeline = None if arguments.no_pipeline else _pipeline(arguments.model, arguments.device)
        tell(ready=time.perf_counter() - started)
        for line in sys.stdin:
            order = json.loads(line)
            tell(result=measured(order["measure"], pipeline, order["options"]))
    except BaseException as error:
        tell(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return 1
    return 0


def measured(measure: str, pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What the function of that name, `module:function`, returns for the pipeline and these options."""
    module, _, function = measure.partition(":")
    gc.collect()
    if pipeline is not None and pipeline.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    return getattr(importlib.import_module(module), function)(pipeline, argparse.Namespace(**options))


def _pipeline(model: str, device: str) -> Any:
    from bench.models import random_pipeline

    return random_pipeline(device, model)


if __name__ == "__main__":
    sys.exit(main())
