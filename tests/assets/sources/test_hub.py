"""Hugging Face repos, with the real huggingface_hub against a stand-in for the Hub: fault rows 20, 21, 23, 28."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file

from download_weights import download_lora
from sdxl_worker import errors, kinds
from sdxl_worker.assets import fetch, remote_files
from sdxl_worker.assets.asset_file import AssetFile
from sdxl_worker.assets.safetensors_file import read_header
from sdxl_worker.assets.sidecar import read_sidecar, sidecar_path
from sdxl_worker.assets.sources import hub
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.lora.peft import peft_scaling
from tests.support import http_server as on
from tests.support.download_files import lora_bytes, published, settings_for
from tests.support.http_server import FileServer
from tests.support.hub_server import Hub, Repo

LORA, OTHER = lora_bytes(1), lora_bytes(2)
DEFAULT = "pytorch_lora_weights.safetensors"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub and its CDN on two ports of loopback; retries without waiting."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "RETRY_S", 0.001)
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    with FileServer() as server, FileServer() as cdn:
        yield Hub(server, cdn)


def get(reference: str, stand_in: Hub, folder: Path, **changes: Any) -> AssetFile:
    return download_lora(reference, settings=settings_for(folder, hf_endpoint=stand_in.endpoint, **changes))


@pytest.mark.parametrize(
    ("reference", "path", "revision"),
    [
        ("user/repo", DEFAULT, "main"),
        ("user/repo/sub/b.safetensors", "sub/b.safetensors", "main"),
        ("user/repo@v2/sub/b.safetensors", "sub/b.safetensors", "v2"),
        ("user/repo@refs/pr/1/sub/b.safetensors", "sub/b.safetensors", "refs/pr/1"),
        ("https://huggingface.co/user/repo/blob/v2/sub/b.safetensors", "sub/b.safetensors", "v2"),
    ],
)
@pytest.mark.parametrize("on_cdn", [False, True])
def test_forms(stand_in: Hub, tmp_path: Path, reference: str, path: str, revision: str, on_cdn: bool):
    files = {DEFAULT: OTHER, "a.safetensors": OTHER, path: LORA}
    repo = Repo(files, revisions=("main", revision), on_cdn=frozenset(files if on_cdn else ()))
    stand_in.add("user/repo", repo)
    file = get(reference, stand_in, tmp_path)
    assert file.path.read_bytes() == LORA
    assert get(reference, stand_in, tmp_path).cached
    assert bool(stand_in.cdn.requests) == on_cdn


def test_an_url_below_the_operators_endpoint_is_the_hub(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/repo", Repo({"a.safetensors": LORA}))
    first = get(f"{stand_in.endpoint}/user/repo/resolve/main/a.safetensors", stand_in, tmp_path)
    assert get("user/repo/a.safetensors", stand_in, tmp_path) == AssetFile(**{**first.__dict__, "cached": True})


def test_the_endpoint_needs_no_public_address_but_what_it_redirects_to_does(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")
    stand_in.add("user/here", Repo({DEFAULT: LORA}))
    stand_in.add("user/there", Repo({DEFAULT: LORA}, on_cdn=frozenset({DEFAULT})))
    assert get("user/here", stand_in, tmp_path).path.read_bytes() == LORA
    with pytest.raises(errors.BlockedAddress):
        get("user/there", stand_in, tmp_path)
    assert stand_in.cdn.connections == 0


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(
    stand_in: Hub, tmp_path: Path, all_logs: pytest.LogCaptureFixture
):
    stand_in.add("user/gated", Repo({DEFAULT: LORA}, gated=True, on_cdn=frozenset({DEFAULT})))
    get("user/gated", stand_in, tmp_path, hf_token=stand_in.token)
    assert all(request.headers["authorization"] == f"Bearer {stand_in.token}" for request in stand_in.server.requests)
    assert len(stand_in.cdn.requests) == 1
    assert "authorization" not in stand_in.cdn.requests[0].headers
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    for secret in (stand_in.token, "sig-secret"):
        assert secret not in all_logs.text + written


# What the Hub says of a token that it does not know.
BAD_TOKEN = "Invalid credentials in Authorization header"


def test_gated_private_and_missing(stand_in: Hub, tmp_path: Path):
    routes = stand_in.server.replies
    stand_in.add("user/gated", Repo({DEFAULT: LORA}, gated=True))
    stand_in.add("user/repo", Repo({DEFAULT: LORA}))
    for reference in ("user/gated", "user/gated/" + DEFAULT):
        stand_in.server.requests.clear()
        with pytest.raises(errors.AccessDenied, match="HF_TOKEN"):
            get(reference, stand_in, tmp_path)
        assert len(stand_in.server.requests) == 1
    for reference in ("user/absent", "user/absent/" + DEFAULT):  # the Hub answers 401, as for a private one
        stand_in.server.requests.clear()
        with pytest.raises(errors.NotFound, match=r"does not exist.* or is private.*HF_TOKEN") as caught:
            get(reference, stand_in, tmp_path)
        assert caught.value.code == "LORA_NOT_FOUND"
        assert len(stand_in.server.requests) == 1
    stand_in.server.replies = {"/api/models/user/repo/revision/main": [on.status(401, x_error_message=BAD_TOKEN)]}
    with pytest.raises(errors.AccessDenied, match="HF_TOKEN"):
        get("user/repo", stand_in, tmp_path / "other", hf_token="expired")
    stand_in.server.replies = routes
    for reference in ("user/absent", "user/repo@v9", "user/repo/absent.safetensors", "user/repo@v9/" + DEFAULT):
        stand_in.server.requests.clear()
        with pytest.raises(errors.NotFound):
            get(reference, stand_in, tmp_path, hf_token=stand_in.token)
        assert len(stand_in.server.requests) == 1


def test_which_file_a_repo_means(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/one", Repo({"README.md": b"", "only.safetensors": LORA, "x.bin": b""}))
    stand_in.add("user/none", Repo({"README.md": b""}))
    stand_in.add("user/pickles", Repo({"a.bin": b"", "b.pt": b""}))
    stand_in.add("user/many", Repo({"a.safetensors": LORA, "b.safetensors": LORA, "v/only.safetensors": OTHER}))
    assert get("user/one", stand_in, tmp_path).path.read_bytes() == LORA
    with pytest.raises(errors.NotFound):
        get("user/none", stand_in, tmp_path)
    with pytest.raises(errors.NotFound, match=r"a\.bin, b\.pt"):
        get("user/pickles", stand_in, tmp_path)
    with pytest.raises(errors.Ambiguous, match=r"a\.safetensors, b\.safetensors"):
        get("user/many", stand_in, tmp_path)
    assert get("user/many/v", stand_in, tmp_path).path.read_bytes() == OTHER
    assert get("https://huggingface.co/user/many/tree/main/v", stand_in, tmp_path).path.read_bytes() == OTHER


def test_a_repo_of_lora_and_embedding_means_either(stand_in: Hub, tmp_path: Path):
    """As diffusers' advanced training script leaves it; the same reference is another file for each kind."""
    embedding = save({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)})
    stand_in.add("user/both", Repo({DEFAULT: LORA, "both_emb.safetensors": embedding, "learned.bin": b""}))
    stand_in.add("user/usual", Repo({"learned_embeds.safetensors": embedding, "a.safetensors": LORA}))
    stand_in.add("user/lora", Repo({DEFAULT: LORA}))
    store = AssetStore(settings_for(tmp_path, hf_endpoint=stand_in.endpoint))
    for _ in range(2):
        assert store.get("user/both", kinds.LORA).path.read_bytes() == LORA
        assert store.get("user/both", kinds.EMBEDDING).path.read_bytes() == embedding
    assert store.get("user/usual", kinds.EMBEDDING).path.read_bytes() == embedding
    with pytest.raises(errors.NotFound):
        store.get("user/lora", kinds.EMBEDDING)


def age(path: Path, seconds: float) -> None:
    """Let the last look at the Hub be `seconds` ago."""
    content = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(content | {"checked_at": time.time() - seconds}))


def test_a_branch_is_checked_again_after_the_interval_only(stand_in: Hub, tmp_path: Path):
    repo = Repo({DEFAULT: LORA})
    stand_in.add("user/repo", repo)
    path = get("user/repo", stand_in, tmp_path).path
    asked = len(stand_in.server.requests)
    age(path, remote_files.RECHECK_S - 60)
    assert get("user/repo", stand_in, tmp_path).cached
    assert len(stand_in.server.requests) == asked
    age(path, remote_files.RECHECK_S + 1)
    assert get("user/repo", stand_in, tmp_path).cached
    assert len(stand_in.server.asked(f"/user/repo/resolve/main/{DEFAULT}")) == 1
    assert get("user/repo", stand_in, tmp_path).cached
    asked = len(stand_in.server.requests)
    assert get("user/repo", stand_in, tmp_path).cached
    assert len(stand_in.server.requests) == asked

    repo.files[DEFAULT] = OTHER
    age(path, remote_files.RECHECK_S + 1)
    moved = get("user/repo", stand_in, tmp_path)
    assert (moved.cached, moved.path, moved.path.read_bytes()) == (False, path, OTHER)
    assert len(published(tmp_path)) == 1


def test_a_commit_is_never_checked_again(stand_in: Hub, tmp_path: Path):
    repo = Repo({DEFAULT: LORA})
    stand_in.add("user/repo", repo)
    path = get(f"user/repo@{repo.commit}", stand_in, tmp_path).path
    age(path, 1e9)
    asked = len(stand_in.server.requests)
    assert get(f"user/repo@{repo.commit}", stand_in, tmp_path).cached
    assert len(stand_in.server.requests) == asked


def test_a_hub_out_of_reach_is_served_from_the_cache(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/repo", Repo({DEFAULT: LORA}))
    store = AssetStore(settings_for(tmp_path, hf_endpoint=stand_in.endpoint))
    path = store.get("user/repo", kinds.LORA).path
    age(path, remote_files.RECHECK_S + 1)
    stand_in.down = True
    assert store.get("user/repo", kinds.LORA).path.read_bytes() == LORA
    asked = len(stand_in.server.requests)
    assert store.get("user/repo", kinds.LORA).cached  # and not asked again for a while
    assert len(stand_in.server.requests) == asked
    with pytest.raises(errors.FetchFailed, match="503"):
        store.get("user/other", kinds.LORA)


def test_a_branch_that_moved_is_kept_once_in_temporary_space(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    repo, folder = Repo({DEFAULT: LORA}), tmp_path / "loras"
    stand_in.add("user/repo", repo)
    path = get("user/repo", stand_in, folder).path
    age(path, remote_files.RECHECK_S + 1)
    repo.files[DEFAULT] = OTHER
    (folder / ".partial").rmdir()
    (folder / ".partial").write_text("a file where the folder should be")
    moved = get("user/repo", stand_in, folder)
    assert (moved.path.read_bytes(), moved.cached) == (OTHER, False)
    again = get("user/repo", stand_in, folder)
    assert (again.path, again.cached) == (moved.path, True)


def test_offline_mode_is_said_at_once(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.FetchFailed, match="HF_HUB_OFFLINE"):
        get("user/repo", stand_in, tmp_path)
    assert stand_in.server.connections == 0


def test_a_file_that_is_not_what_the_hub_announced_is_refused(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/repo", Repo({DEFAULT: LORA}, on_cdn=frozenset({DEFAULT})))
    stand_in.cdn.add(f"/cdn/{on.sha256(LORA)}", on.whole(OTHER))
    with pytest.raises(errors.FetchFailed, match="damaged"):
        get("user/repo", stand_in, tmp_path)
    assert published(tmp_path) == []


def test_limits_hold_for_the_hub_too(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/repo", Repo({DEFAULT: LORA}))
    with pytest.raises(errors.TooLarge):
        get("user/repo", stand_in, tmp_path, lora_max_mb=0.001)
    stand_in.server.replies = {f"/user/repo/resolve/main/{DEFAULT}": [on.silent]}
    with pytest.raises(errors.FetchTimeout):
        get(f"user/repo/{DEFAULT}", stand_in, tmp_path / "other", download_timeout=0.4)


def test_the_sidecar_names_the_repo(stand_in: Hub, tmp_path: Path):
    stand_in.add("user/repo", Repo({DEFAULT: LORA}))
    read = read_sidecar(get("user/repo", stand_in, tmp_path).path)
    assert read is not None
    assert (read[0].reference, read[0].base_model) == ("user/repo", "SDXL")


def _adapter(ending: str, folder: Path) -> bytes:
    key = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 32), f"{key}.lora_B.weight": torch.ones(32, 4)}
    (torch.save if ending == "bin" else save_file)(tensors, folder / "made")
    return (folder / "made").read_bytes()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(("config", "alpha"), [({"r": 4, "lora_alpha": 16}, 16.0), (None, None)])
def test_a_peft_adapter_keeps_its_alpha(
    stand_in: Hub, tmp_path: Path, ending: str, config: dict[str, int] | None, alpha: float | None
):
    name = f"adapter_model.{ending}"
    files = {name: _adapter(ending, tmp_path)} | (
        {"adapter_config.json": json.dumps(config).encode()} if config else {}
    )
    stand_in.add("user/repo", Repo(files))
    file = get(f"user/repo/{name}", stand_in, tmp_path)
    scaling = peft_scaling(read_header(file.path).metadata).get("")
    assert (scaling and scaling.alpha) == alpha
    assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert get(f"user/repo/{name}", stand_in, tmp_path).cached
