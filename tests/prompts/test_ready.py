"""The token that stands for a file unless the request says it, and how a request's embeddings are had."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from sdxl_worker.assets.sidecar import sidecar_path
from sdxl_worker.assets.store import AssetStore
from sdxl_worker.errors import InvalidRequest, WorkerError
from sdxl_worker.job_run import JobRun
from sdxl_worker.kinds import EMBEDDING, LORA
from sdxl_worker.prompts.ready import make_ready, token_of
from sdxl_worker.request import EmbeddingSpec
from sdxl_worker.serving.turns import Turns
from sdxl_worker.settings import Settings
from sdxl_worker.topology import write_example_lora
from tests.support.download_files import published
from tests.support.embedding_files import save_embedding
from tests.support.http_server import FileServer, whole
from tests.support.hub_server import Hub, Repo

TWO = (torch.randn(2, 16), torch.randn(2, 24))


@pytest.mark.parametrize(
    ("reference", "name", "token"),
    [
        ("bad-hands-5", "bad-hands-5.safetensors", "bad-hands-5"),
        ("bad hands.pt", "0123456789ab_bad_hands.safetensors", "bad hands"),
        ("0123456789ab_style.safetensors", "0123456789ab_style.safetensors", "style"),
        ("v1.5", "v1.5.safetensors", "v1.5"),
        ("/models/loras/style.safetensors", "style.safetensors", "style"),
        ("https://example.com/My%20Style.safetensors?sig=s3cret", "0123456789ab_My_20Style.safetensors", "My Style"),
        ("user/repo/sub/Style.BIN", "0123456789ab_Style.safetensors", "Style"),
        ("user/repo", "0123456789ab_repo.safetensors", "repo"),
        ("https://huggingface.co/user/repo", "0123456789ab_repo.safetensors", "repo"),
        ("civitai:12345@67890", "lora_0123456789ab.safetensors", ""),
        ("https://example.com/download", "lora_0123456789ab.safetensors", ""),
    ],
)
def test_the_token_is_the_name_of_the_file(reference: str, name: str, token: str) -> None:
    assert token_of(reference, name) == token


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> AssetStore:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    return AssetStore(Settings(model_id="tiny", lora_cache_dir=tmp_path / "loras"))


def ready(store: AssetStore, *specs: EmbeddingSpec):
    return make_ready(specs, store, (16, 24), JobRun("job", Turns().ticket()))


def test_from_a_url_into_the_cache_of_the_loras(store: AssetStore, tmp_path: Path) -> None:
    content = save_embedding(tmp_path / "source" / "a.safetensors", TWO).read_bytes()
    with FileServer() as server:
        url = server.add("/My%20style.safetensors", whole(content))
        (first,) = ready(store, EmbeddingSpec(url))
        (again,) = ready(store, EmbeddingSpec(url, "other"))
        assert len(server.asked("/My%20style.safetensors")) == 1
    assert (first.token, again.token) == ("My style", "other")
    assert (first.file.cached, again.file.cached) == (False, True)
    assert torch.equal(first.vectors["text_encoder_2"], TWO[1])
    assert published(tmp_path / "loras") == [first.file.name]
    assert first.as_json() == {"token": "My style", "name": first.file.name, "vectors": 2, "sha256": first.file.sha256}


def test_it_counts_in_the_cache_s_limit_and_is_evicted(store: AssetStore, tmp_path: Path) -> None:
    content = save_embedding(tmp_path / "source" / "a.safetensors", TWO).read_bytes()
    with FileServer() as server:
        (found,) = ready(store, EmbeddingSpec(server.add("/a.safetensors", whole(content))))
    os.utime(sidecar_path(found.file.path), (1, 1))
    few = AssetStore(dataclasses.replace(store.settings, lora_cache_max_gb=1e-9))
    assert few.prune(LORA) == [found.file.path]


def test_cog_s_file_has_a_token_for_each_vector(store: AssetStore, tmp_path: Path) -> None:
    save_embedding(tmp_path / "loras" / "embeddings.pti", TWO, ("text_encoders_0", "text_encoders_1"))
    (found,) = ready(store, EmbeddingSpec("embeddings.pti"))
    assert list(found.tokens) == ["<s0>", "<s1>", "TOK"]
    assert torch.equal(found.tokens["<s1>"]["text_encoder"], TWO[0][1:])
    assert torch.equal(found.tokens["TOK"]["text_encoder"], TWO[0])
    assert list(ready(store, EmbeddingSpec("embeddings", "style"))[0].tokens) == ["<s0>", "<s1>", "style"]


def test_cog_s_token_map_lies_beside_it_in_a_repo(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    names = ("text_encoders_0", "text_encoders_1")
    content = save_embedding(tmp_path / "source" / "a.safetensors", TWO, names).read_bytes()
    odd = {"MAN": "<s0><s1>", "FACE": "<s1>", "FAR": "<s2>", "TEXT": "<s0> x", "LIST": ["<s0>"], "": "<s0>"}
    with FileServer() as server, FileServer() as cdn:
        hub = Hub(server, cdn)
        hub.add("user/cog", Repo({"embeddings.pti": content, "special_params.json": json.dumps(odd).encode()}))
        hub.add("user/old", Repo({"embeddings.pti": content, "special_params.json": b"[" * 100_000}))
        store = AssetStore(Settings(lora_cache_dir=tmp_path / "loras", hf_endpoint=hub.endpoint))
        (found,) = ready(store, EmbeddingSpec("user/cog/embeddings.pti"))
        (old,) = ready(store, EmbeddingSpec("user/old/embeddings.pti"))
    assert (found.token, list(found.tokens)) == ("MAN", ["MAN", "FACE", "<s0>", "<s1>"])
    assert torch.equal(found.tokens["FACE"]["text_encoder_2"], TWO[1][1:])
    assert torch.equal(found.tokens["MAN"]["text_encoder"], TWO[0])
    assert list(old.tokens) == ["<s0>", "<s1>", "TOK"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_goes_through_its_own_process(nested: bool, store: AssetStore, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    of_sd1 = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x", "step": 500}
    torch.save(of_sd1 if nested else {"clip_l": TWO[0], "clip_g": TWO[1]}, tmp_path / "loras" / "style.pt")
    if nested:
        with pytest.raises(WorkerError, match=r"for Stable Diffusion 1\.5") as failure:
            ready(store, EmbeddingSpec("style"))
        assert failure.value.code == "EMBEDDING_INCOMPATIBLE"
    else:
        (found,) = ready(store, EmbeddingSpec("style"))
        assert (found.token, len(found.vectors["text_encoder"])) == ("style", 2)


def test_a_file_of_the_other_kind_is_said(store: AssetStore, tmp_path: Path) -> None:
    """Whichever it was checked as first."""
    write_example_lora(tmp_path / "loras")
    save_embedding(tmp_path / "loras" / "style.safetensors", TWO)
    store.get("tiny-example", LORA)
    store.get("style", EMBEDDING)
    for name, kind, code, sentence in (
        ("tiny-example", EMBEDDING, "NOT_AN_EMBEDDING", "the file is a LoRA"),
        ("style", LORA, "LORA_INCOMPATIBLE", "it is an embedding"),
    ):
        with pytest.raises(WorkerError, match=sentence) as failure:
            store.get(name, kind)
        assert failure.value.code == code


def test_errors_have_the_kind_s_codes(store: AssetStore, tmp_path: Path) -> None:
    for reference, code in (("absent", "EMBEDDING_NOT_FOUND"), ("ftp://x/a.pt", "EMBEDDING_REFERENCE")):
        with pytest.raises(WorkerError) as failure:
            ready(store, EmbeddingSpec(reference))
        assert failure.value.code == code
    save_embedding(tmp_path / "loras" / "real.safetensors", (torch.ones(1, 768), torch.ones(1, 1280)))
    with pytest.raises(WorkerError, match="768 and 1280 numbers wide and this model's text encoders 16") as failure:
        ready(store, EmbeddingSpec("real"))
    assert failure.value.code == "EMBEDDING_INCOMPATIBLE"


def test_a_reference_without_a_name_needs_a_token(store: AssetStore) -> None:
    with pytest.raises(InvalidRequest, match=r"embeddings\[3\] needs a token"):
        ready(store, EmbeddingSpec("civitai:1@2", index=3))
