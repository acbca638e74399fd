"""Convert a .pt or .bin file (a pickle) to safetensors, in a process of its own with limits on memory and time.

`torch.load(weights_only=True)` runs no code of the file, but a 1 kB file can make it allocate gigabytes; the worker's
own memory is not put at stake.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_worker.assets.budget import TICK_S, Budget
from sdxl_worker.errors import BadFile

SECONDS = 120
# torch does not compress what it saves: more than this and the file was made to inflate.
INFLATION = 4
HEADROOM = 512 * 2**20

_EXIT_NOT_TENSORS = 3
_ROOT = Path(__file__).resolve().parents[2]


def convert_pickle(source: Path, target: Path, budget: Budget) -> None:
    """Write the tensors of the pickle `source` to the safetensors file `target`, which is absent after a failure.

    Takes plain state dicts and one level of nesting (`{"state_dict": {...}}`, and AUTOMATIC1111's `string_to_param`,
    whose entries keep it in front of their names). Raises BadFile when the file holds
    anything but tensors and plain values, is broken, or wants more memory or time than its size explains; Cancelled
    and FetchTimeout when `budget` ends first.
    """
    limit = INFLATION * source.stat().st_size
    command = [sys.executable, "-m", "sdxl_worker.assets.pickles", str(source), str(target), str(limit)]
    nothing = subprocess.DEVNULL
    status = None
    with subprocess.Popen(command, cwd=_ROOT, stdin=nothing, stdout=nothing, stderr=nothing) as process:
        try:
            status = _exit_status(process, budget)
        finally:
            if status != 0:
                process.kill()
                process.wait()
                target.unlink(missing_ok=True)
    if status == _EXIT_NOT_TENSORS:
        raise BadFile("the pickle holds something other than a table of tensors")
    if status != 0:
        raise BadFile("the pickle cannot be read safely: it is broken, hostile or inflates to far more than its size")


def _exit_status(process: subprocess.Popen[bytes], budget: Budget) -> int:
    """The status of `process` once it has ended; raises Cancelled, FetchTimeout and BadFile while it has not."""
    own = Budget.start(SECONDS)
    while True:
        try:
            return process.wait(TICK_S)
        except subprocess.TimeoutExpired:
            budget.check()
            if own.is_over:
                raise BadFile("reading the pickle took too long; convert the file to safetensors") from None


def _tensors(content: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return
    nested = content.get("string_to_param")
    if isinstance(nested, dict):
        content = content | {f"string_to_param.{name}": value for name, value in nested.items()}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(float(value))
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            yield name, value.detach()


def _main(source: str, target: str, limit: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    # Only now: the imports map far more address space than they use.
    allowed = _address_space() + HEADROOM + 2 * int(limit)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    tensors = dict(_tensors(torch.load(source, map_location="cpu", weights_only=True)))
    if not tensors:
        return _EXIT_NOT_TENSORS
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > int(limit):
        raise MemoryError("the tensors are far larger than the file")
    # Views of one storage must become tensors of their own for safetensors.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target)
    return 0


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:4]))
