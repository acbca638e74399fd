"""The image holds what the worker needs, nothing hides the baked weights, and it starts from the copied files alone."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy
import pytest
from safetensors.numpy import save

from tests.support import http_server as on
from tests.support.http_server import FileServer
from tests.support.hub_server import Hub, Repo
from tests.support.readme import ROOT, readme_table, unquoted

JOB = {
    "input": {
        "prompt": "a lighthouse",
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "seed": 1,
        "loras": [{"path": "tiny-example", "scale": 0.8}],
    }
}


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) for each instruction of the Dockerfile, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def arguments_of(keyword: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == keyword]


def copies(before: str = "") -> list[tuple[str, str]]:
    """(source, target) of each COPY from the build context; a target that ends with / is a folder.

    With `before`: of those in front of the instruction that has this word.
    """
    pairs = []
    for name, arguments in instructions():
        if before and before in arguments and name == "RUN":
            break
        if name != "COPY":
            continue
        *sources, target = [word for word in shlex.split(arguments) if not word.startswith("--")]
        pairs += [(source, target) for source in sources]
    return pairs


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for arguments in arguments_of("ENV") for word in shlex.split(arguments))


def is_ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or one of its folders decides, `!` takes it back in."""
    ignored = False
    names = [path, *(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        plain = pattern.removeprefix("!").removeprefix("**/").rstrip("/")
        parts = names if not pattern.startswith("**/") else [*names, *(PurePosixPath(name).name for name in names)]
        if any(fnmatch.fnmatchcase(name, plain) for name in parts):
            ignored = not pattern.startswith("!")
    return ignored


def copy_build_context(target: Path, before: str = "") -> None:
    """What `docker build` would put into its working folder, and nothing else."""
    for source, place in copies(before):
        origin, folder = ROOT / source, target / place
        if origin.is_dir():
            shutil.copytree(origin, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, folder)


def test_every_copied_file_is_in_the_build_context() -> None:
    assert copies()
    for source, target in copies():
        assert (ROOT / source).exists(), source
        assert not is_ignored(source), source
        assert (ROOT / source).is_dir() or target.endswith("/"), "several files need a folder as target"


def test_nothing_else_enters_the_build_context() -> None:
    for path in (
        ".git",
        ".venv/bin/python",
        "tests/test_x.py",
        ".env",
        "output/a.png",
        "sdxl_worker/__pycache__/x.pyc",
    ):
        assert is_ignored(path), path
    assert not is_ignored("sdxl_worker/settings.py")


def test_requirements_are_installed_before_the_code_is_copied() -> None:
    order = [f"{name} {arguments}" for name, arguments in instructions()]
    installed = next(place for place, line in enumerate(order) if "pip install" in line)
    assert "requirements.txt" in order[installed]
    assert order.index("COPY requirements.txt ./") < installed < order.index("COPY sdxl_worker ./sdxl_worker")


def test_models_is_a_link_to_the_volume_and_hides_no_baked_weights() -> None:
    assert "ln -s /runpod-volume/models /models" in arguments_of("RUN")
    home = PurePosixPath(environment()["HF_HOME"])
    assert not home.is_relative_to("/models")
    assert not home.is_relative_to("/runpod-volume")


def test_weights_are_baked_unless_a_build_argument_says_no() -> None:
    assert "BAKE_MODEL=1" in arguments_of("ARG")
    (bake,) = [run for run in arguments_of("RUN") if "download_weights.py" in run]
    assert re.search(r'if \[ "\$BAKE_MODEL" = 1 \]; then .*python download_weights\.py; +fi$', bake)
    for token in ("HF_TOKEN", "CIVITAI_API_TOKEN"):
        assert f"--mount=type=secret,id={token},required=false" in bake, "a build argument would stay in the image"
        assert not any(token in arguments for name, arguments in instructions() if name in ("ARG", "ENV"))
    for name in ("MODEL_ID", "REFINER_ID"):
        assert environment()[name] == f"${name}", "what is baked is what is served"
    assert "REFINER_ID=" in arguments_of("ARG")


def test_the_worker_gets_the_stop_signal_itself() -> None:
    (command,) = arguments_of("CMD")
    assert json.loads(command) == ["python", "-u", "handler.py"]


def run_the_bake_step(folder: Path, **environment: str) -> str:
    """Run the download on the files that are copied before it, with the shell line of the Dockerfile."""
    copy_build_context(folder, before="download_weights.py")
    (bake,) = [run for run in arguments_of("RUN") if "download_weights.py" in run]
    line = re.sub(r"--mount=\S+ ", "", bake).replace("/run/secrets", str(folder / "secrets"))
    (folder / "secrets").mkdir()
    (folder / "secrets" / "HF_TOKEN").write_text("hf_secret")
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=python | {"BAKE_MODEL": "1", "HF_HOME": str(folder / "home")} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_weights_are_fetched_by_the_files_copied_before_them(tmp_path: Path) -> None:
    """Model, VAE and refiner from the Hub; the token comes from the build secret."""
    weights = {f"{name}/model.fp16.safetensors": b"x" for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
    with FileServer() as server, FileServer() as cdn:
        hub = Hub(server, cdn)
        hub.add("user/model", Repo({"model_index.json": b"{}", **weights}, gated=True))
        hub.add("user/vae", Repo({"config.json": b"{}", "model.safetensors": b"x"}))
        hub.add("user/refiner", Repo({"model_index.json": b"{}", **weights}))
        ids = {"MODEL_ID": "user/model", "VAE_ID": "user/vae", "REFINER_ID": "user/refiner"}
        said = run_the_bake_step(tmp_path, **ids, HF_ENDPOINT=hub.endpoint)
    found = [path.relative_to(tmp_path) for path in (tmp_path / "home").rglob("*.safetensors")]
    assert len(found) == 4 + 1 + 1
    # Text encoder and VAE are the base model's.
    assert [path.parent.name for path in found if "models--user--refiner" in path.parts] == ["unet"]
    assert "hf_secret" not in said


def test_a_single_file_is_fetched_by_the_files_copied_before_it(tmp_path: Path) -> None:
    with FileServer() as server:
        url = server.add("/model.safetensors", on.whole(save({"a": numpy.zeros(4)})))
        run_the_bake_step(tmp_path, MODEL_ID=url, VAE_ID="", RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS="true")
    assert len(list((tmp_path / "home").rglob("*_model.safetensors"))) == 1


def test_an_edit_that_does_not_concern_the_download_does_not_repeat_it() -> None:
    first = [source for source, _ in copies(before="download_weights.py")]
    later = ("worker.py", "request", "schedulers.py", "serving", "lora", "prompts", "generate/render.py")
    for name in later:
        path = PurePosixPath("sdxl_worker") / name
        assert (ROOT / path).exists(), name
        assert not any(path.is_relative_to(source) or PurePosixPath(source).is_relative_to(path) for source in first)
    assert {"handler.py", "schemas.py", "sdxl_worker"}.isdisjoint(first)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exactly what the Dockerfile copies."""
    folder = tmp_path_factory.mktemp("image")
    copy_build_context(folder)
    return folder


def run_in_image(image: Path, cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the image's python in its working folder; the repository is on no path."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-u", *command],
        cwd=image,
        env={
            **kept,
            "MODEL_ID": "tiny",
            "LORA_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_lora_job_runs_from_the_copied_files_alone(image: Path, tmp_path: Path) -> None:
    """With /models as in the image: a link to a folder of the volume that is not there yet."""
    (tmp_path / "models").symlink_to(tmp_path / "runpod-volume" / "models")
    done = run_in_image(image, tmp_path / "models" / "loras", "handler.py", "--test_input", json.dumps(JOB))
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "error" not in log.lower(), log
    (picture,) = (image / "output").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runpod-volume" / "models" / "loras" / "tiny-example.safetensors").is_file()


SCRIPT = """
import json, os, sys
import download_weights, handler, schemas, sdxl_worker
places = [module.__file__ for module in (download_weights, handler, schemas, sdxl_worker)]
untouched = not os.path.exists(os.environ["LORA_CACHE_DIR"])
print(json.dumps([places, untouched, handler.generate_image(json.loads(sys.argv[1]))]))
"""


def test_the_copied_modules_answer_with_the_fields_of_the_readme(image: Path, tmp_path: Path) -> None:
    done = run_in_image(image, tmp_path / "loras", "-c", SCRIPT, json.dumps(JOB))
    assert done.returncode == 0, done.stderr
    places, untouched, answer = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(path).is_relative_to(image) for path in places)
    assert untouched, "importing does no work"
    fields = [unquoted(row["Field"]) for row in readme_table("Answer", "Field")]
    assert list(answer) == [name for name in fields if name not in ("seeds", "settings", "used_embeddings", "warnings")]
    (lora,) = answer["loras"]
    named = [unquoted(row["In `loras`"]) for row in readme_table("Answer", "In `loras`")]
    assert list(lora) == [name for name in named if name not in ("start`, `end", "trigger_words")]
