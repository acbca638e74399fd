"""Find a LoRA file in a Hugging Face repo: huggingface_hub answers what and where, the worker's own fetch gets it.

hf_hub_download() can neither be stopped, nor bounded in size and time, nor kept from a second copy of the file; its
metadata call (with HF_TOKEN, HF_ENDPOINT and the Hub's redirects) and our fetch can.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sdxl_worker.assets.budget import Budget, run_within
from sdxl_worker.assets.connect import Target
from sdxl_worker.assets.kind import Kind
from sdxl_worker.assets.location import Location
from sdxl_worker.assets.references import MAX_PART, WEIGHT_SUFFIXES, RemoteReference, hashed_name
from sdxl_worker.assets.sources.hub_answers import HEADERS, bound_answers
from sdxl_worker.assets.urls import split_http_url
from sdxl_worker.errors import AccessDenied, Ambiguous, BadReference, FetchError, FetchFailed, NotFound
from sdxl_worker.logs import take_over_hub_log
from sdxl_worker.masking import has_query, mask
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
# What PEFT saves beside its weights holds the alpha that the tensors lack; its name in metadata is diffusers'.
PEFT_STEM, PEFT_CONFIG, PEFT_METADATA = "adapter_model", "adapter_config.json", "lora_adapter_metadata"
# What cog-sdxl saves beside its embeddings: which words of a prompt stand for which of the vectors.
COG_SUFFIX, COG_TOKEN_MAP, COG_METADATA = ".pti", "special_params.json", "token_map"
METADATA_TIMEOUT_S = 10.0
ATTEMPTS = 3
RETRY_S = 0.5
SHOWN_CANDIDATES = 10
AUTH_HINT = "set HF_TOKEN to a token that may read it"

_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?"
_FORM = re.compile(
    rf"(?P<repo>{_REPO_PART}/{_REPO_PART})(?:@(?P<revision>refs/(?:pr|convert)/[\w\-]+|[\w.\-]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubReference(RemoteReference):
    """A file of a Hugging Face repo; `path` is a file, or a folder ("" = the repo's root) to choose the file from.

    `usual_file` is the one that is taken where a folder has it.
    """

    repo: str
    revision: str = "main"
    path: str = ""
    usual_file: str = LORA_FILE

    @property
    def is_file(self) -> bool:
        return self.path.lower().endswith(WEIGHT_SUFFIXES)

    @property
    def is_moving(self) -> bool:
        """Only a full commit hash names the same bytes for ever; a branch or a tag may move."""
        return _COMMIT.fullmatch(self.revision) is None

    @property
    def canonical(self) -> str:
        # One folder may mean another file for another kind of asset; LoRAs were here first.
        other = "" if self.is_file or self.usual_file == LORA_FILE else f"?{self.usual_file}"
        return f"hf:{self.repo}@{self.revision}/{self.path}{other}"

    @property
    def shown(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}/{self.path}".rstrip("/")

    @property
    def file_name(self) -> str:
        readable = (
            self.path if self.is_file else f"{self.repo}/{self.path}".strip("/").replace("/", "_") + ".safetensors"
        )
        return hashed_name(self.canonical, readable.rpartition("/")[2])

    def locate(self, settings: Settings, budget: Budget) -> Location:
        return _locate(self, settings, budget)


def parse(text: str, settings: Settings, kind: Kind) -> HubReference | None:
    """`user/repo[@revision][/path]`, or a URL of the Hub; None for anything else. Raises BadReference."""
    if re.match(r"(?i)https?:", text):
        return _parse_url(text, settings, kind)
    return _parse_name(text, text, kind) if re.match(r"[^/:]+/", text) else None


def _parse_url(text: str, settings: Settings, kind: Kind) -> HubReference | None:
    _, host, _ = split_http_url(text)
    endpoint, url = urlsplit(settings.hf_endpoint), urlsplit(text)
    at_endpoint = url.netloc.lower() == endpoint.netloc.lower()
    if host not in _HOSTS and not at_endpoint:
        return None
    prefix = "" if host in _HOSTS else endpoint.path.rstrip("/")
    parts = [unquote(part) for part in url.path.removeprefix(prefix).strip("/").split("/")]
    if parts[0] in ("datasets", "spaces", "api"):
        return None
    if len(parts) < 2:
        raise BadReference(f"the URL {mask(text)} names no Hugging Face repo")
    if len(parts) > 2 and parts[2] not in ("blob", "resolve", "tree", "raw"):
        raise BadReference(f"the URL {mask(text)} is not a file, folder or repo of the Hugging Face Hub")
    return _parse_name("/".join(parts), text, kind)


def _parse_name(text: str, asked: str, kind: Kind) -> HubReference:
    found = _FORM.fullmatch(text)
    if found is None or len(text) > 512 or has_query(text):
        raise BadReference(f"the {kind.name} reference {mask(asked)} is not a user/repo of the Hugging Face Hub")
    revision, path = found["revision"], (found["path"] or "").rstrip("/")
    page = re.fullmatch(r"(?:blob|resolve|tree|raw)/(refs/(?:pr|convert)/[\w\-]+|[^/]+)(?:/(.*))?", path)
    if page is not None and revision is None:
        revision, path = page[1], page[2] or ""
    revision = revision or "main"
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") or len(part) > MAX_PART for part in parts) or not revision.strip("."):
        raise BadReference(f"the {kind.name} reference {mask(asked)} names no valid path inside the repo")
    return HubReference(found["repo"], revision, path, kind.usual_file)


def _locate(reference: HubReference, settings: Settings, budget: Budget) -> Location:
    """The file's address, commit-independent identity (its ETag) and sha256; raises FetchError subclasses."""
    from huggingface_hub import HfApi, get_hf_file_metadata, get_session, get_token, hf_hub_url

    bound_answers(get_session())
    take_over_hub_log()
    endpoint = settings.hf_endpoint.rstrip("/")
    token = settings.hf_token or get_token() or False
    path = reference.path
    if not reference.is_file:
        api = HfApi(endpoint=endpoint, token=token, headers=HEADERS)
        path = choose_file(_ask(reference, budget, lambda: _list_files(api, reference)), reference)

    def look_up(path: str) -> tuple[Any, Target]:
        url = hf_hub_url(reference.repo, path, revision=reference.revision, endpoint=endpoint)
        found: Any = _ask(
            reference,
            budget,
            lambda: get_hf_file_metadata(url, token=token, timeout=METADATA_TIMEOUT_S, endpoint=endpoint),
        )
        # The CDN's address carries its own signature; the token stays with the Hub.
        at_home = urlsplit(found.location).netloc == urlsplit(endpoint).netloc
        headers = {"Authorization": f"Bearer {token}"} if token and at_home else {}
        return found, Target(found.location, headers, trusted_origin=endpoint, auth_hint=AUTH_HINT)

    found, target = look_up(path)
    etag = found.etag or ""
    return Location(
        target,
        identity=f"{path}:{etag or found.commit_hash}",
        sha256=etag if re.fullmatch(r"[0-9a-f]{64}", etag) else "",
        suffix=PurePosixPath(path).suffix.lower(),
        beside=_beside(path, look_up),
    )


def _beside(path: str, look_up: Callable[[str], tuple[Any, Target]]) -> dict[str, Target]:
    """The JSON files that belong to the weights at `path`, where the repo has them."""
    weights = PurePosixPath(path)
    if weights.stem == PEFT_STEM:
        metadata, name = PEFT_METADATA, PEFT_CONFIG
    elif weights.suffix == COG_SUFFIX:
        metadata, name = COG_METADATA, COG_TOKEN_MAP
    else:
        return {}
    try:
        return {metadata: look_up(str(weights.with_name(name)))[1]}
    except NotFound:
        what = "alpha is taken to be the rank" if name == PEFT_CONFIG else "its tokens are taken to be in a row"
        logger.warning("%s has no %s beside it: %s", path, name, what)
        return {}


def choose_file(files: list[str], reference: HubReference) -> str:
    """The one meant among a repo's files (or a folder's): the usual name, or the only .safetensors there is.

    Where another kind of file is looked for, a LoRA under its usual name is passed over.

    Raises NotFound when there is none, Ambiguous with the candidates when there are several.
    """
    folder = f"{reference.path}/" if reference.path else ""
    inside = [name for name in files if name.startswith(folder)]
    usual = folder + reference.usual_file
    if usual in inside:
        return usual
    weights = sorted(name for name in inside if name.lower().endswith(".safetensors") and name != folder + LORA_FILE)
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise Ambiguous(
            f"{reference.shown} holds {len(weights)} .safetensors files; name one of them: {_listed(weights)}"
        )
    others = sorted(name for name in inside if name.lower().endswith(WEIGHT_SUFFIXES))
    hint = f"; name one of its other weight files: {_listed(others)}" if others else ""
    raise NotFound(f"{reference.shown} holds no .safetensors file{hint}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_CANDIDATES} more" if len(names) > SHOWN_CANDIDATES else ""
    return ", ".join(names[:SHOWN_CANDIDATES]) + more


def _list_files(api: HfApi, reference: HubReference) -> list[str]:
    info = api.model_info(reference.repo, revision=reference.revision, timeout=METADATA_TIMEOUT_S)
    return [file.rfilename for file in info.siblings or []]


def _ask(reference: HubReference, budget: Budget, question: Any) -> Any:
    """The Hub's answer, asked again when it is overloaded or out of reach."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return run_within(budget, question)
        except Exception as error:
            failure, is_final = _explain(error, reference)
            if is_final or attempt == ATTEMPTS:
                raise failure from error
            logger.info("%s; trying again", failure)
        budget.wait(RETRY_S * attempt)
    raise AssertionError("unreachable")


def _explain(error: Exception, reference: HubReference) -> tuple[FetchError, bool]:
    """(our error, whether asking again is useless) for what huggingface_hub raised."""
    from huggingface_hub import errors

    name, status = reference.shown, getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FetchError):
        return error, True
    if isinstance(error, errors.HFValidationError):
        return NotFound(f"{reference.repo} is not a valid repo name of the Hugging Face Hub"), True
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        # Without a token the Hub answers 401 for a repo that does not exist and for a private one alike.
        hint = f", or is private: check its name, or {AUTH_HINT}" if status == 401 else ""
        return NotFound(f"{name} does not exist on the Hugging Face Hub{hint}"), True
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return AccessDenied(f"the Hugging Face Hub refuses access to {name}: {AUTH_HINT}"), True
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{reference.repo} has no revision {reference.revision}"), True
    if isinstance(error, errors.EntryNotFoundError):
        return NotFound(f"{reference.repo} has no file {reference.path} at {reference.revision}"), True
    if status in (404, 410):
        return NotFound(f"{name} does not exist on the Hugging Face Hub"), True
    if status is not None and status < 500 and status not in (408, 429):
        return FetchFailed(f"the Hugging Face Hub answers with status {status} for {name}"), True
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FetchFailed(f"HF_HUB_OFFLINE is set, so {name} cannot be looked up"), True
    reason = f"answers with status {status}" if status is not None else "cannot be reached"
    return FetchFailed(f"the Hugging Face Hub {reason} (for {name})"), False
