"""A worker and a server for hostile jobs, and what has to hold after each of them."""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import importlib
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from sdxl_worker import kinds
from sdxl_worker.assets import fetch
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.sources import hub
from sdxl_worker.errors import AssetFileError, FetchError, InvalidRequest, WorkerError
from sdxl_worker.logs import masked
from sdxl_worker.settings import Settings
from sdxl_worker.worker import Worker
from tests.hostile import masks, pictures, requests, servers
from tests.hostile.case import SECRET, Case, job
from tests.hostile.loras import Loras
from tests.hostile.measure import peak_mb, reset_peak, resident_mb, timed
from tests.support.http_server import FileServer, Reply, status

# Of this process, the test server's threads included; a busy machine does not count.
CPU_LIMIT_S = 5.0
# Only what waits for something that never comes takes this long, even on a machine that is busy with other things.
HANG_LIMIT_S = 300.0
# Of the job's own thread, asleep and not waiting for a processor: a download ends after DOWNLOAD_TIMEOUT.
SLEEP_LIMIT_S = 20.0
PEAK_LIMIT_MB = 1000.0
DOWNLOAD_TIMEOUT_S = 2.0
# What an outsider may not bring about, whatever he sends: these say that the worker or its operator is at fault.
_NEVER = (
    *("INTERNAL", "OUT_OF_MEMORY", "DEVICE_FAILED", "RESTORE_FAILED", "MODEL_UNAVAILABLE", "UPLOAD_FAILED"),
    "CACHE_WRITE",
)


@dataclass(frozen=True)
class Result:
    """How a case ended: the answer's code ("" = a picture), its cost, and every rule that it broke."""

    family: str
    index: int
    what: str
    code: str
    cpu_s: float
    wall_s: float
    peak_mb: float
    broken: tuple[str, ...]


class Hung(Exception):
    """A job did not come back: nothing that follows could be believed."""


class Arena:
    """A tiny worker with a cache folder of its own under `folder`, and a server; use as a context manager."""

    FAMILIES = ("requests", "loras", "pictures", "masks", "servers")

    def __init__(self, folder: Path, *, pickles: float = 0.02) -> None:
        self.server, self._sites = FileServer(), FileServer()
        self._routes = _Routes()
        self.server.replies = self._sites.replies = self._routes
        endpoints: dict[str, Any] = {
            name: self._sites.origin
            for name in ("hf_endpoint", "civitai_endpoint")
            if name in {entry.name for entry in fields(Settings)}
        }
        self.worker = Worker(
            Settings(
                model_id="tiny",
                lora_cache_dir=folder / "loras",
                download_timeout=DOWNLOAD_TIMEOUT_S,
                lora_max_mb=20.0,
                lora_ram_cache_gb=0.01,
                lora_cache_max_gb=0.05,
                **endpoints,
            )
        )
        self._pickles = pickles
        self._log = _Lines()
        self._threads = ThreadPoolExecutor(1, "hostile")
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Arena:
        self._open.enter_context(self.server)
        self._open.enter_context(self._sites)
        # No waiting between tries, and a Hub to talk to.
        self._open.enter_context(mock.patch.object(fetch, "BACKOFF_S", 0.001))
        self._open.enter_context(mock.patch.object(hub, "RETRY_S", 0.001))
        self._open.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", False))
        self._open.enter_context(self._log.listening())
        self._generators = {
            "requests": requests.make,
            "loras": Loras(self.worker.pipeline.unet, self._pickles).make,
            "pictures": pictures.make,
            "masks": masks.make,
            "servers": servers.make,
        }
        self._plain = self._pixels()
        # What the first download imports: it would not fit into a case's time on a busy machine.
        importlib.import_module("runpod.serverless.utils.rp_ssrf")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._threads.shutdown(wait=False)

    def case(self, seed: int, family: str, index: int) -> Case:
        """Always the same case for the same numbers, but for the server's port."""
        return self._generators[family](Random(f"{seed} {family} {index}"), self.server.origin)

    def run(self, seed: int, family: str, index: int) -> Result:
        """Run one case and hold it to the rules; raises Hung."""
        case = self.case(seed, family, index)
        self._routes.replies = case.replies
        folder = self.worker.settings.lora_cache_dir
        for name, content in case.by_hand.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        self._log.lines.clear()
        reset_peak()
        before, cpu, wall = resident_mb(), time.process_time(), time.monotonic()
        with mock.patch.dict("os.environ", {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"} if case.served else {}):
            future = self._threads.submit(timed, self.worker.run, case.job)
            try:
                answer, asleep = future.result(HANG_LIMIT_S)
            except NotInTime:
                faulthandler.dump_traceback()
                raise Hung(f"{family} {index} has run for {HANG_LIMIT_S:g} s: {case.what}") from None
            except Exception as error:  # Worker.run never raises
                answer, asleep = {"error": f"INTERNAL: raised {error!r}"}, 0.0
        cpu, wall, peak = time.process_time() - cpu, time.monotonic() - wall, peak_mb() - before
        for name in case.by_hand:
            (folder / name).unlink(missing_ok=True)
        broken = [*_broken(answer), *self._log.broken(answer)]
        if cpu > CPU_LIMIT_S:
            broken.append(f"took {cpu:.1f} s of CPU time")
        if asleep > SLEEP_LIMIT_S:
            broken.append(f"waited for {asleep:.1f} s")
        if peak > PEAK_LIMIT_MB:
            broken.append(f"needed {peak:.0f} MB")
        return Result(family, index, case.what, _code(answer), cpu, wall, peak, tuple(broken))

    def check_usable(self) -> list[str]:
        """What is wrong with the worker by now: the plain picture's bits, and a good LoRA."""
        broken = [] if (self._pixels() == self._plain).all() else ["the plain picture has other bits"]
        answer = self.worker.run(job(loras=["tiny-example"]))
        if "images" not in answer:
            broken.append(f"a good LoRA is not applied any more: {answer}")
        return broken

    def _pixels(self) -> np.ndarray:
        answer = self.worker.run(job())
        if "images" not in answer:
            raise AssertionError(f"the plain request fails: {answer}")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0].partition(",")[2]))))


class _Routes(dict[str, list[Reply]]):
    """The server's table: the case's own paths, or its "*"."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: dict[str, list[Reply]] = {}

    def get(self, path: str, default: Any = None) -> Any:
        return self.replies.get(path) or self.replies.get("*") or [status(404)]


class _Lines(logging.Handler):
    """The worker's log lines as RunPod would get them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(masked(self.format(record)))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("sdxl_worker")
        level, passed_on = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = passed_on

    def broken(self, answer: Any) -> list[str]:
        text = "\n".join(self.lines)
        broken = ["a secret is in the log"] if SECRET in text else []
        if _code(answer) in _callers() and "Traceback (most recent" in text:
            broken.append(f"a traceback for the caller's error: {text[-1500:]}")
        if _code(answer) in _NEVER:
            broken.append(f"log: {text[-2500:]}")
        return broken


def _code(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else "?"
    return str(error).partition(":")[0] if error else ""


def _broken(answer: Any) -> list[str]:
    """The rules that the answer breaks on its own."""
    try:
        text = json.dumps(answer, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, TypeError) as error:
        return [f"the answer cannot be sent: {error}"]
    broken = ["a secret is in the answer"] if SECRET in text else []
    if "refresh_worker" in answer:
        broken.append("the worker wants to be replaced")
    if "error" not in answer:
        return broken if answer.get("images") else [*broken, f"neither picture nor error: {text[:200]}"]
    if not re.fullmatch(r"[A-Z_]+: .+", answer["error"], re.DOTALL) or _code(answer) not in public_codes():
        broken.append(f"an error without a known code: {text[:300]}")
    if _code(answer) in _NEVER:
        broken.append(f"answered {text[:300]}")
    if "Traceback" in text or len(text) > 20_000:
        broken.append(f"an error of {len(text)} characters: {text[:300]}")
    return broken


def public_codes() -> dict[str, type[WorkerError]]:
    """Every code that an answer may have."""
    codes: dict[str, type[WorkerError]] = {}
    waiting: list[type[WorkerError]] = [WorkerError]
    there = [kind for kind in vars(kinds).values() if isinstance(kind, Kind)]
    while waiting:
        error = waiting.pop()
        waiting += error.__subclasses__()
        codes[error.code] = error
        if issubclass(error, FetchError | AssetFileError):
            codes |= {kind.codes[error]: error for kind in there if error in kind.codes}
    return codes


def _callers() -> set[str]:
    return {code for code, error in public_codes().items() if error.caller_at_fault and error is not InvalidRequest} | {
        InvalidRequest.code
    }
