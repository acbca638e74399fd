"""Cold workers that all want one file at once, on one cache and on one each: a part of `bench.cache`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.file_server import server
from download_weights import download_lora
from sdxl_worker.settings import Settings
from tests.support.download_files import lora_bytes

WORKERS = 8
RACE_MB = 200


def measure_workers(folder: Path) -> dict[str, Any]:
    """Cold start of WORKERS processes on one cache, against one process, and against one cache each; medians of 3."""
    file = folder / "race.safetensors"
    file.write_bytes(lora_bytes(megabytes=RACE_MB))
    cases = {"one": (1, True), "shared": (WORKERS, True), "each its own": (WORKERS, False)}
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    for _ in range(3):
        for name, (workers, shared) in cases.items():
            with server(file) as origin, tempfile.TemporaryDirectory(dir=folder) as scratch:
                caches = [Path(scratch) / ("cache" if shared else str(index)) for index in range(workers)]
                took = race(f"{origin}/race.safetensors", caches)
                count = subprocess.run(["curl", "-s", f"{origin}/count"], capture_output=True, text=True, check=True)
                seen[name].append((took, int(count.stdout)))
    medians = {
        name: {
            "workers": cases[name][0],
            "seconds": statistics.median(took for took, _ in runs),
            "downloads": max(count for _, count in runs),
            "runs": runs,
        }
        for name, runs in seen.items()
    }
    return {"megabytes": RACE_MB, **medians}


def race(url: str, caches: list[Path]) -> float:
    """Seconds until every worker has its file, from when all of them are ready."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "bench.cold_workers"]
    workers: list[Any] = [subprocess.Popen([*command, str(cache), url], **pipes) for cache in caches]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.stdout.readline() == "done\n"
    took = time.perf_counter() - start
    assert [worker.wait() for worker in workers] == [0] * len(workers)
    return took


def worker(cache: Path, url: str) -> None:
    """One process of the race, with everything imported that a worker has imported when a job comes."""
    import runpod.serverless.utils.rp_ssrf
    import torch

    assert runpod is not None
    torch.set_num_threads(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    download_lora(url, settings=Settings(lora_cache_dir=cache))
    sys.stdout.write("done\n")
    sys.stdout.flush()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
