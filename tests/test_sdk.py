"""The SDK is imported without py-cpuinfo's processes, and knows the processor all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cpuinfo
import pytest

from sdxl_worker import sdk
from tests.integration.worker_process import ROOT

# A start that ends where the model is looked for: everything has been imported by then.
_START = """
import json, sys
started = []
sys.addaudithook(lambda event, arguments: started.append(repr(arguments[1])) if event == "subprocess.Popen" else None)
import handler
sys.argv = ["handler.py", "--test_input", '{"input": {"prompt": "a"}}']
status = handler.main()
import cpuinfo, gc
from runpod.serverless.utils import rp_debugger
own = cpuinfo.cpuinfo._get_cpu_info_from_proc_cpuinfo().get("brand_raw")
print(json.dumps([status, started, rp_debugger.PROCESSOR, own, cpuinfo.get_cpu_info.__module__, gc.isenabled()]))
"""


def test_a_start_asks_no_other_process_for_the_processors_name(tmp_path: Path):
    environment = {**os.environ, "MODEL_ID": "/nowhere", "LORA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _START]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    status, started, processor, own, asked, collecting = json.loads(done.stdout.splitlines()[-1])
    assert status == 1
    assert [command for command in started if "cpuinfo.py" in command] == []
    assert processor == own
    assert (asked, collecting) == ("cpuinfo.cpuinfo", True)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """How often py-cpuinfo is asked, which says "py-cpuinfo" for everything."""
    times: list[str] = []

    def ask() -> dict[str, str]:
        times.append("asked")
        return {"brand_raw": "py-cpuinfo", "arch": "py-cpuinfo"}

    monkeypatch.setattr(cpuinfo, "get_cpu_info", ask)
    return times


def test_py_cpuinfo_is_asked_for_what_is_not_known(asked, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(sdk, "_KERNEL_SAYS", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor: 2 GHz\nflags\t: a b\n")
    with sdk._name_from_the_kernel():
        facts = cpuinfo.get_cpu_info()
        assert (facts["brand_raw"], asked) == ("A Processor: 2 GHz", [])
        assert (facts["arch"], asked) == ("py-cpuinfo", ["asked"])
        with pytest.raises(KeyError):
            facts["nothing"]
    assert cpuinfo.get_cpu_info()["brand_raw"] == "py-cpuinfo"


@pytest.mark.parametrize("content", ["processor\t: 0\n", "", None])
def test_a_kernel_that_does_not_say_the_name(content, asked, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(sdk, "_KERNEL_SAYS", tmp_path / "cpuinfo")
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    with sdk._name_from_the_kernel():
        assert cpuinfo.get_cpu_info()["brand_raw"] == "py-cpuinfo"


def test_an_sdk_without_py_cpuinfo(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    with sdk._name_from_the_kernel():
        pass
