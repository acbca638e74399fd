"""The rules of the house, read from the source: layers, no cycle, no module that keeps state, sizes, quiet imports.

docs/ARCHITECTURE.md says why.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import TypeVar

import pytest

from tests.support.readme import ROOT

PACKAGE = "sdxl_worker"
# From the bottom up. A module may import from its own layer and from those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("text", "background", "masking", "data_uris", "checks", "errors", "settings", "logs", "sdk"),
        *("schedulers", "few_step", "prediction_marks", "request"),
    ),
    ("job_run",),
    ("assets",),
    ("kinds", "memory", "transfers", "lora", "prompts", "topology"),
    ("generate",),
    ("serving",),
    ("resident", "drawing", "worker"),
    ("handler", "download_weights", "schemas"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / f"{name}.py" for name in LAYERS[-1])]
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 300, 60
HEAVY = ("torch", "diffusers", "transformers", "runpod", "huggingface_hub", "boto3")


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it: at run time, later, and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The project's modules that the module `name` imports."""
    found = set()
    for target in imported(TREES[name]):
        module = target if target in MODULES else target.rpartition(".")[0]
        if module in MODULES:
            found.add(module)
    return found - {PACKAGE, name}


def layer_of(name: str) -> int:
    part = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else name
    (place,) = [place for place, layer in enumerate(LAYERS) if part in layer]
    return place


def test_every_module_has_its_layer() -> None:
    for name in MODULES:
        assert name == PACKAGE or layer_of(name) >= 0, name


def test_imports_go_only_downwards() -> None:
    upwards = [
        f"{name} -> {target}"
        for name in MODULES
        if name not in (PACKAGE, "sdxl_worker.kinds")
        for target in own_imports(name)
        if layer_of(target) > layer_of(name)
    ]
    assert upwards == []


def test_kinds_know_the_formats_only_when_a_file_is_checked() -> None:
    """The table of kinds names what checks each kind, and so may import `lora`, but only inside a function."""
    top = ast.Module([node for node in TREES["sdxl_worker.kinds"].body if not isinstance(node, ast.FunctionDef)], [])
    assert not [name for name in imported(top) if name.startswith("sdxl_worker.lora")]
    assert not [
        name for name in MODULES if name.startswith("sdxl_worker.assets") and "sdxl_worker.kinds" in own_imports(name)
    ]


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: own_imports(name) for name in MODULES}
    cycles = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycles.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in graph:
        visit(name, ())
    assert cycles == []


# What makes an object that changes, or that guards one.
STATEFUL_CALLS = {
    *("dict", "list", "set", "bytearray", "Counter", "defaultdict", "OrderedDict", "deque", "count", "cycle", "Queue"),
    *("Lock", "RLock", "Event", "Condition", "Semaphore", "Thread", "ThreadPoolExecutor", "ContextVar", "local"),
    *("WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "LRUCache", "open", "Session", "Random", "Generator"),
}
# The running job's id, for the log: contextvars are per task by themselves and know no other home than a module.
ALLOWED_STATE = {"sdxl_worker.logs.current_job"}
CACHES = {"cache", "lru_cache", "cached"}


def called(node: ast.expr) -> str:
    """The last name of what a call calls, or of what a decorator is; empty for anything else."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when the module is imported: its body, blocks and class bodies included, functions not."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []))


def module_state(name: str) -> Iterator[str]:
    tree = TREES[name]
    written = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{name}: global {', '.join(node.names)}"
    for node in statements(tree.body):
        if isinstance(node, ast.FunctionDef) and any(called(entry) in CACHES for entry in node.decorator_list):
            yield f"{name}.{node.name}: a cache that lives as long as the process"
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in (entry.id for entry in targets if isinstance(entry, ast.Name)):
            value, constant = node.value, target.strip("_").isupper() and target not in written
            literal = isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)
            if literal and not (constant and isinstance(value, ast.Dict | ast.DictComp)) and target != "__all__":
                yield f"{name}.{target}: a container that can be changed"
            elif isinstance(value, ast.Call) and called(value) in STATEFUL_CALLS:
                yield f"{name}.{target}: {called(value)}()"


def test_no_module_keeps_state() -> None:
    """Constants are tuples, frozensets, mapping proxies, or dicts in capitals that nothing writes to."""
    found = {line for name in MODULES for line in module_state(name) if line.partition(":")[0] not in ALLOWED_STATE}
    assert found == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("seen = {}", 1),
        ("NAMES = ['a']", 1),
        ("SIZES = {'a': 1}", 0),
        ("SIZES = {}\ndef f(): SIZES['a'] = 1", 1),
        ("lock = threading.Lock()", 1),
        ("@functools.cache\ndef worker(): ...", 1),
        ("def f():\n    global x\n    x = 1", 1),
        ("class A:\n    seen: set[str] = set()", 1),
        ("NAMES = ('a',)\nKINDS = frozenset({'b'})\ndef f():\n    x = []", 0),
    ],
)
def test_the_search_for_state_finds_it(monkeypatch: pytest.MonkeyPatch, source: str, expected: int) -> None:
    monkeypatch.setitem(TREES, "example", ast.parse(source))
    assert len(list(module_state("example"))) == expected


CONSTANT_TYPES = (
    *(str, bytes, int, float, complex, bool, type(None), tuple, frozenset, MappingProxyType, re.Pattern, Path),
    *(ModuleType, FunctionType, BuiltinFunctionType, type, logging.Logger, functools.partial, TypeVar),
)
TYPING = ("typing", "types", "_typing", "collections.abc", "torch", "__future__")


def is_constant(name: str, value: object) -> bool:
    """True for what cannot change, and for dicts in capitals, which test_no_module_keeps_state looks after."""
    if name == "__all__" or isinstance(value, CONSTANT_TYPES) or type(value).__module__ in TYPING:
        return True
    if dataclasses.is_dataclass(value):
        return bool(getattr(type(value), "__dataclass_params__").frozen)  # noqa: B009  (typeshed does not know it)
    return isinstance(value, dict) and name.strip("_").isupper()


def assigned(name: str) -> Iterator[str]:
    """The names that the module `name` gives values to, imports and definitions left out."""
    for node in statements(TREES[name].body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_what_modules_hold_is_constant() -> None:
    """The same question to the modules themselves: an object of a class of our own would not show in the source."""
    found = set()
    for name in MODULES:
        module = importlib.import_module(name)
        found |= {f"{name}.{key}" for key in assigned(name) if not is_constant(key, getattr(module, key, None))}
    # The process that the SDK starts, and the running job's id.
    assert found == {"handler.process", "sdxl_worker.logs.current_job"}


def test_modules_and_functions_can_be_read_at_one_go() -> None:
    too_long = [
        f"{name}: {lines} lines"
        for name, path in MODULES.items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_MODULE_LINES
    ]
    too_long += [
        f"{name}.{node.name}: {lines} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


IMPORT_ALL = """
import importlib, json, os, sys, threading
before = set(os.listdir("."))
names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
files = sorted(set(os.listdir(".")) - before)
print(json.dumps([files, [t.name for t in threading.enumerate()], sorted(sys.modules)]))
"""


def import_all(folder: Path, names: list[str]) -> tuple[list[str], list[str], set[str]]:
    """(new files, threads, loaded modules) after importing `names` in a fresh process with an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(names)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "MODEL_ID": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    files, threads, modules = json.loads(done.stdout.splitlines()[-1])
    return files, threads, set(modules)


def test_importing_does_no_work(tmp_path: Path) -> None:
    files, threads, _ = import_all(tmp_path, sorted(MODULES))
    assert files == []
    assert threads == ["MainThread"]


@pytest.mark.parametrize("name", ["schemas", "handler", "download_weights", "sdxl_worker.kinds"])
def test_what_only_checks_or_helps_loads_nothing_heavy(tmp_path: Path, name: str) -> None:
    _, _, modules = import_all(tmp_path, [name])
    assert modules.isdisjoint(HEAVY)


# What is imported but declared under another name, or comes with Python.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "lycoris": "lycoris-lora",
    "OpenSSL": "pyopenssl",
    "yaml": "pyyaml",
    "cpuinfo": "py-cpuinfo",
}
# Torch for CUDA requires the very version that goes with it; without CUDA nothing needs it.
WITH_TORCH = {"triton"}
LOCAL = {PACKAGE, "tests", "bench", *LAYERS[-1]}


def declared(file: str) -> dict[str, str]:
    """Distribution -> pinned version of a requirements file, of those that are for this system."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    required = [line.partition(";") for line in lines if line and not line.startswith("-")]
    # The only marker there is.
    assert {marker.strip() for _, _, marker in required} <= {"", 'platform_system == "Linux"'}
    pins = [pin.strip().partition("==") for pin, _, marker in required if not marker or sys.platform == "linux"]
    return {name.partition("[")[0].lower().replace("_", "-"): version for name, _, version in pins}


def outside_imports(*names: str) -> set[str]:
    """The distributions that the modules of these folders or files import."""
    found = set()
    for name in names:
        for path in (ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]:
            found |= {target.split(".")[0] for target in imported(ast.parse(path.read_text(encoding="utf-8")))}
    return {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in found - LOCAL - sys.stdlib_module_names}


def test_what_is_imported_is_declared() -> None:
    runtime, tests = declared("requirements.txt"), declared("requirements-dev.txt")
    assert outside_imports(PACKAGE, *LAYERS[-1]) - set(runtime) - WITH_TORCH == set()
    assert outside_imports("tests", "bench") - set(runtime) - set(tests) - WITH_TORCH == set()


def test_pins_are_what_the_tests_run_with() -> None:
    pins = declared("requirements.txt") | declared("requirements-dev.txt")
    assert all(pins.values()), "every requirement is pinned"
    assert {name: metadata.version(name).partition("+")[0] for name in pins} == pins


def test_the_version_is_said_once() -> None:
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
