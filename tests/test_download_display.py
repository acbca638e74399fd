"""What somebody sees while download_weights.py works: a real process on a pseudo terminal, the real Hub client."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import http_server as on
from tests.support.http_server import FileServer, sha256
from tests.support.hub_server import Hub, Repo
from tests.support.readme import ROOT

WEIGHTS = {
    f"{name}/model.fp16.safetensors": bytes([number]) * 100_000
    for number, name in enumerate(("text_encoder", "text_encoder_2", "unet", "vae"))
}
FILES = {"model_index.json": b"{}", "unet/config.json": b"{}", **WEIGHTS}
LAST = "vae/model.fp16.safetensors"


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    """A Hub with one model, whose weights lie on another host behind signed addresses."""
    with FileServer() as server, FileServer() as cdn:
        hub = Hub(server, cdn)
        hub.add("user/model", Repo(FILES, on_cdn=frozenset(WEIGHTS)))
        yield hub


# A worker that fetches its base model when it starts, with its own log.
WORKER = (
    "from sdxl_worker.logs import configure_logging\n"
    "from sdxl_worker.generate.base_model import find_base_model\n"
    "from sdxl_worker.settings import Settings\n"
    "configure_logging([])\n"
    "find_base_model(Settings.from_environment())\n"
)


def start(hub: Hub, home: Path, stderr: int, *command: str) -> subprocess.Popen[str]:
    """The download of the base model, with every library as talkative as its variables make it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORA_"))}
    settings = {
        "MODEL_ID": "user/model",
        "VAE_ID": "",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_VERBOSITY": "debug",
        "TQDM_MININTERVAL": "0",  # every step of the bar is drawn
    }
    return subprocess.Popen(
        [sys.executable, *(command or ("download_weights.py",))],
        cwd=ROOT,
        env=environment | settings,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def read_until_closed(terminal: int, release: threading.Event) -> str:
    """What the terminal showed; `release` is set once a bar stood between 0 and 100 %."""
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side is gone
            return shown.decode()
        shown += piece
        if any(0 < percent < 100 for percent in percents(shown.decode(errors="replace"))):
            release.set()


def percents(shown: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+)%", shown)]


def test_the_bar_moves_and_nothing_else_is_shown(stand_in: Hub, tmp_path: Path) -> None:
    release, reached = threading.Event(), threading.Event()
    held = on.held(WEIGHTS[LAST], 10, release, reached)
    # The first try is cut off: what the Hub client says about it names the signed address.
    stand_in.cdn.add(f"/cdn/{sha256(WEIGHTS[LAST])}", on.cut(WEIGHTS[LAST], 10), held)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 100))
    process = start(stand_in, tmp_path, end)
    os.close(end)
    shown = read_until_closed(terminal, release)
    os.close(terminal)
    out, _ = process.communicate()
    assert process.returncode == 0, shown
    assert "user/model" in out
    assert re.search(r"user/model: +\d+%.*400k/400k", shown)
    assert percents(shown) == sorted(percents(shown))
    assert any(0 < percent < 100 for percent in percents(shown))
    assert_discreet(shown + out)


def test_a_build_log_holds_no_bar_and_no_signature(stand_in: Hub, tmp_path: Path) -> None:
    process = start(stand_in, tmp_path, subprocess.STDOUT)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "%" not in out
    assert len(out.splitlines()) <= 6, out
    assert_discreet(out)


def test_a_worker_that_fetches_its_model_shows_no_signature(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.cdn.add(f"/cdn/{sha256(WEIGHTS[LAST])}", on.cut(WEIGHTS[LAST], 10), on.whole(WEIGHTS[LAST]))
    process = start(stand_in, tmp_path, subprocess.STDOUT, "-c", WORKER)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "Error while downloading" in out, "the warning itself is there"
    assert_discreet(out)


def assert_discreet(text: str) -> None:
    for secret in ("X-Amz", "sig-secret", "HTTP Request", "HTTP/1.1"):
        assert secret not in text, text
