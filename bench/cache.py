"""What the LoRA cache costs: a large download against curl, a hit, and eight cold workers against one, in one run.

Everything is on loopback and one disk. The large file is written to `--folder` by both sides: a memory file system
(/dev/shm) measures the two programs, a disk mostly measures the disk. `fetch` is the transfer with its sha256, which
curl does not compute; `download_lora` adds the check of every value, fsync and the rename. A hit's system calls are
counted with strace where there is one. Prints a table of ratios and writes everything to bench/results/.

    python -m bench.cache [--megabytes 1000] [--repeats 7] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.cold_workers import WORKERS, measure_workers
from bench.file_server import server
from bench.report import machine, table, write_result
from download_weights import download_lora
from sdxl_worker.assets.budget import Budget
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.fetch import fetch_to
from sdxl_worker.settings import Settings
from tests.support.download_files import lora_bytes

HITS = 1000


def seconds(action: Any, *arguments: Any) -> float:
    """How long `action(*arguments)` takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def with_curl(url: str, target: Path) -> None:
    """The yardstick."""
    subprocess.run(["curl", "--silent", "--fail", "--output", str(target), url], check=True)


def with_fetch(url: str, target: Path) -> None:
    """The worker's transfer alone: guard, hash, limits."""
    with target.open("xb", buffering=0) as sink:
        fetch_to(sink, Target(url), max_bytes=1 << 40, budget=Budget.start(600))


def with_download_lora(url: str, target: Path) -> None:
    """All of it, into a new cache folder."""
    download_lora(url, settings=Settings(lora_cache_dir=target, lora_max_mb=1e6, download_timeout=600))


def measure_download(file: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Throughput of the worker's transfer, then of all of download_lora, each in turns with curl."""
    size = file.stat().st_size
    results: dict[str, Any] = {"bytes": size}
    with server(file) as origin:
        url = f"{origin}/large.safetensors"
        for name, program, times in (("fetch", with_fetch, repeats), ("download_lora", with_download_lora, 3)):
            taken = in_turns(url, folder, {"curl": with_curl, name: program}, times)
            rates = {each: size / 1e6 / statistics.median(values) for each, values in taken.items()}
            # Round by round, since neighbours in time had the same machine.
            ratio = statistics.median(curl / own for curl, own in zip(taken["curl"], taken[name], strict=True))
            results[name] = {"seconds": taken, "megabytes_per_second": rates, "ratio_to_curl": ratio}
    return results


def in_turns(url: str, folder: Path, programs: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of each program, one after the other, so that a busy machine slows all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch) / "target"
        for round_number in range(repeats + 1):
            for name, program in programs.items():
                took = seconds(program, url, target)
                shutil.rmtree(target) if target.is_dir() else target.unlink()
                if round_number:  # the first round imports and warms up
                    taken[name].append(took)
    return taken


def hit(folder: Path, url: str, times: int) -> list[float]:
    """Seconds of each of `times` cache hits."""
    settings = Settings(lora_cache_dir=folder)
    return [seconds(lambda: download_lora(url, settings=settings)) for _ in range(times)]


def measure_hit(folder: Path) -> dict[str, Any]:
    """Milliseconds and system calls of a hit on a small file."""
    file = folder / "small.safetensors"
    file.write_bytes(lora_bytes())
    cache = folder / "hits"
    with server(file) as origin:
        url = f"{origin}/small.safetensors"
        download_lora(url, settings=Settings(lora_cache_dir=cache))
    taken = hit(cache, url, HITS)
    milliseconds = {"median": statistics.median(taken) * 1e3, "worst": max(taken) * 1e3}
    return {"hits": HITS, "milliseconds": milliseconds, "calls_per_hit": calls_per_hit(cache, url)}


def calls_per_hit(cache: Path, url: str) -> dict[str, float] | None:
    """System calls by name that a hit makes: what 100 hits make more than none; None without strace."""
    if shutil.which("strace") is None:
        return None
    counts = [_traced(cache, url, times) for times in (1, 101)]
    more = {name: (counts[1][name] - counts[0][name]) / 100 for name in counts[1]}
    return {name: count for name, count in sorted(more.items()) if count >= 0.5}


def _traced(cache: Path, url: str, times: int) -> collections.Counter[str]:
    with tempfile.NamedTemporaryFile() as log:
        trace = ["strace", "-f", "-e", "trace=%file,%desc", "-o", log.name]
        command = [sys.executable, "-m", "bench.cache", "--hits", str(times), str(cache), url]
        subprocess.run([*trace, *command], check=True)
        found = re.findall(r"^\d+ +(\w+)\(", Path(log.name).read_text(), re.MULTILINE)
    return collections.Counter(found)


def report(results: dict[str, Any]) -> str:
    """The table of ratios."""
    taken, calls = results["hit"]["milliseconds"]["median"], results["hit"]["calls_per_hit"]
    one, shared, own = (results["workers"][name] for name in ("one", "shared", "each its own"))
    counted = "" if calls is None else f", {sum(calls.values()):.0f} system calls"
    rows = []
    for program in ("fetch", "download_lora"):
        rates = results["download"][program]["megabytes_per_second"]
        measured = f"{rates[program]:.0f} / {rates['curl']:.0f} MB/s"
        rows.append((f"{program} / curl, throughput", results["download"][program]["ratio_to_curl"], measured))
    rows.append(("hit / the 5 ms it may take", taken / 5, f"{taken:.3f} ms{counted}"))
    for name, other, what in ((shared, one, "1"), (shared, own, f"{WORKERS} with a cache each")):
        measured = (
            f"{name['seconds']:.2f} / {other['seconds']:.2f} s, {name['downloads']} / {other['downloads']} downloads"
        )
        rows.append((f"{WORKERS} cold workers / {what}, time", name["seconds"] / other["seconds"], measured))
    return table(("what", "ratio", "measured"), [(what, f"{ratio:.2f}", measured) for what, ratio, measured in rows])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--hits", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"] = "true"
    if options.hits:
        hit(Path(options.hits[1]), options.hits[2], int(options.hits[0]))
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    """All three measurements."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        large = folder / "large.safetensors"
        large.write_bytes(lora_bytes(megabytes=options.megabytes, modules=8))
        curl = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True)
        results = {
            **machine(),
            "folder": str(options.folder),
            "load_average": [os.getloadavg()[0]],  # of all programs on the machine: before, and after
            "curl": curl.stdout.splitlines()[0],
            "download": measure_download(large, folder, options.repeats),
            "hit": measure_hit(folder),
            "workers": measure_workers(folder),
        }
        results["load_average"].append(os.getloadavg()[0])
    path = write_result("cache", results)
    sys.stdout.write(f"{report(results)}\n\n{path}\n")


if __name__ == "__main__":
    main()
