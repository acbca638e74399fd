"""What a LoRA reference means: a text from a request -> one of four frozen forms, and its name in the cache.

Pure: no network and no file system, apart from following the cache folder's own symbolic link.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from sdxl_worker.assets.urls import canonical_url, public_query, split_http_url
from sdxl_worker.errors import BadReference
from sdxl_worker.masking import mask
from sdxl_worker.settings import Settings
from sdxl_worker.text import is_unicode

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_URL = 4096
MAX_PART = 200  # leaves room for the hash and the suffixes below the usual limit of 255 bytes

_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_CIVITAI_HOSTS = frozenset({"civitai.com", "www.civitai.com"})
_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"(?P<repo>{_REPO_PART}/{_REPO_PART})(?:@(?P<revision>refs/(?:pr|convert)/[\w\-]+|[\w.\-]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CIVITAI = re.compile(
    r"(?i)(?:civitai|urn:air:[\w.\-]+:[\w.\-]+:civitai):(?P<model>\d+)(?:@(?P<version>\d+))?(?:\.\w+)?"
)


@dataclass(frozen=True)
class UrlReference:
    """A direct http(s) URL, as asked for (it may hold a secret in its query: show only `shown`)."""

    url: str

    def __repr__(self) -> str:
        return f"UrlReference({self.shown!r})"

    @property
    def canonical(self) -> str:
        return canonical_url(self.url)

    @property
    def shown(self) -> str:
        return mask(self.url)

    @property
    def file_name(self) -> str:
        return _hashed_name(self.canonical, Path(unquote(urlsplit(self.url).path)).name)


@dataclass(frozen=True)
class HubReference:
    """A file of a Hugging Face repo; `path` is a file, or a folder ("" = the repo's root) to choose the file from."""

    repo: str
    revision: str = "main"
    path: str = ""

    @property
    def is_file(self) -> bool:
        return self.path.lower().endswith(WEIGHT_SUFFIXES)

    @property
    def is_moving(self) -> bool:
        """Only a full commit hash names the same bytes for ever; a branch or a tag may move."""
        return _COMMIT.fullmatch(self.revision) is None

    @property
    def canonical(self) -> str:
        return f"hf:{self.repo}@{self.revision}/{self.path}"

    @property
    def shown(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}/{self.path}".rstrip("/")

    @property
    def file_name(self) -> str:
        readable = (
            self.path if self.is_file else f"{self.repo}/{self.path}".strip("/").replace("/", "_") + ".safetensors"
        )
        return _hashed_name(self.canonical, readable.rpartition("/")[2])


@dataclass(frozen=True)
class CivitaiReference:
    """A model version on civitai.com; `version` 0 = the newest of `model`. `options` choose among a version's files."""

    version: int
    model: int = 0
    options: tuple[tuple[str, str], ...] = ()
    token: str = ""

    def __repr__(self) -> str:
        return f"CivitaiReference({self.shown!r})"

    @property
    def is_moving(self) -> bool:
        return self.version == 0

    @property
    def canonical(self) -> str:
        what = f"version/{self.version}" if self.version else f"model/{self.model}"
        return f"civitai:{what}?{urlencode(sorted(self.options))}".rstrip("?")

    @property
    def shown(self) -> str:
        if self.version:
            return f"https://civitai.com/api/download/models/{self.version}"
        return f"https://civitai.com/models/{self.model}"

    @property
    def file_name(self) -> str:
        return _hashed_name(self.canonical, "")


@dataclass(frozen=True)
class CachedReference:
    """A file already inside the cache folder, by its path relative to it; the suffix may be left out."""

    name: str

    @property
    def canonical(self) -> str:
        return f"cached:{self.name}"

    @property
    def shown(self) -> str:
        return self.name

    @property
    def file_name(self) -> str:
        """The checked file's name: the file itself, or for a pickle the name of its converted copy."""
        if self.name.endswith(".safetensors"):
            return self.name
        if self.name.endswith(WEIGHT_SUFFIXES):
            return _hashed_name(self.canonical, Path(self.name).name)
        return f"{self.name}.safetensors"


Reference = UrlReference | HubReference | CivitaiReference | CachedReference


def parse_reference(text: str, settings: Settings) -> Reference:
    """The form that `text` has (DESIGN: LoRA references); raises BadReference for anything else."""
    reference = text.strip() if isinstance(text, str) else ""
    if not reference:
        raise BadReference("a LoRA reference is empty")
    if "\\" in reference or not reference.isprintable() or not is_unicode(reference):
        raise BadReference(f"the LoRA reference {mask(reference)} holds characters that are not allowed")
    for pattern, parse in _FORMS:
        if pattern.match(reference):
            return parse(reference, settings)
    raise BadReference(f"the LoRA reference {mask(reference)} has no form that this worker knows")


def _parse_url(text: str, settings: Settings) -> Reference:
    if len(text) > MAX_URL:
        raise BadReference(f"the URL {mask(text)} is longer than {MAX_URL} characters")
    _, host, _ = split_http_url(text)
    endpoint = urlsplit(settings.hf_endpoint)
    if host in _HUB_HOSTS or urlsplit(text).netloc.lower() == endpoint.netloc.lower():
        prefix = endpoint.path.rstrip("/") if host not in _HUB_HOSTS else ""
        return _parse_hub_url(text, prefix)
    if host in _CIVITAI_HOSTS:
        return _parse_civitai_url(text)
    return UrlReference(text)


def _parse_hub_url(text: str, prefix: str) -> Reference:
    parts = [unquote(part) for part in urlsplit(text).path.removeprefix(prefix).strip("/").split("/")]
    if parts[0] in ("datasets", "spaces", "api"):
        return UrlReference(text)
    if len(parts) < 2:
        raise BadReference(f"the URL {mask(text)} names no Hugging Face repo")
    if len(parts) > 2 and parts[2] not in ("blob", "resolve", "tree", "raw"):
        raise BadReference(f"the URL {mask(text)} is no file, folder or repo of the Hugging Face Hub")
    return _hub_reference("/".join(parts), text)


def _parse_hub(text: str, _settings: Settings) -> Reference:
    return _hub_reference(text, text)


def _hub_reference(text: str, asked: str) -> HubReference:
    found = _HUB.fullmatch(text)
    if found is None or len(text) > 512:
        raise BadReference(f"the LoRA reference {mask(asked)} is no user/repo of the Hugging Face Hub")
    revision, path = found["revision"], (found["path"] or "").rstrip("/")
    page = re.fullmatch(r"(?:blob|resolve|tree|raw)/(refs/(?:pr|convert)/[\w\-]+|[^/]+)(?:/(.*))?", path)
    if page is not None and revision is None:
        revision, path = page[1], page[2] or ""
    revision = revision or "main"
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") or len(part) > MAX_PART for part in parts) or not revision.strip("."):
        raise BadReference(f"the LoRA reference {mask(asked)} names no valid path inside the repo")
    return HubReference(found["repo"], revision, path)


def _parse_civitai_url(text: str) -> Reference:
    parts = urlsplit(text)
    query = dict(parse_qsl(parts.query))
    download = re.fullmatch(r"/api/download/models/(\d+)/?", parts.path)
    if download:
        options = tuple(pair for pair in public_query(parts.query))
        return CivitaiReference(int(download[1]), options=options, token=query.get("token", ""))
    page = re.match(r"/models/(\d+)(?:/|$)", parts.path)
    if page is None:
        raise BadReference(f"the URL {mask(text)} is neither a model page nor a download link of Civitai")
    version = query.get("modelVersionId", "0")
    if not version.isdecimal():
        raise BadReference(f"the URL {mask(text)} has a modelVersionId that is no number")
    return CivitaiReference(int(version), int(page[1]) if int(version) == 0 else 0)


def _parse_civitai(text: str, _settings: Settings) -> Reference:
    found = _CIVITAI.fullmatch(text)
    if found is None:
        raise BadReference(f"the LoRA reference {mask(text)} is no civitai:ID@VERSION or AIR urn of Civitai")
    version = int(found["version"] or 0)
    return CivitaiReference(version, 0 if version else int(found["model"]))


def _parse_absolute(text: str, settings: Settings) -> Reference:
    path = Path(text)
    if ".." not in path.parts:
        for folder in (settings.lora_cache_dir.absolute(), settings.lora_cache_dir.resolve()):
            if path.is_relative_to(folder) and path != folder:
                return _parse_cached(str(path.relative_to(folder)), settings)
    raise BadReference("an absolute path must lie inside the LoRA cache folder")


def _parse_cached(text: str, _settings: Settings) -> Reference:
    parts = text.split("/")
    if len(text.encode()) > 1024 or any(
        part.startswith(".") or not part or len(part.encode()) > MAX_PART for part in parts
    ):
        raise BadReference(f"the LoRA reference {mask(text)} is no valid file name")
    return CachedReference(text)


def _refuse_scheme(text: str, _settings: Settings) -> Reference:
    raise BadReference(f"the LoRA reference {mask(text)} is neither http nor https, nor a Civitai urn")


# The first pattern that matches the start decides.
_FORMS: tuple[tuple[re.Pattern[str], Callable[[str, Settings], Reference]], ...] = (
    (re.compile(r"(?i)https?:"), _parse_url),
    (re.compile(r"(?i)(civitai|urn:air):"), _parse_civitai),
    (re.compile(r"[^/]*:"), _refuse_scheme),
    (re.compile(r"/"), _parse_absolute),
    (re.compile(r"[^/]+/"), _parse_hub),
    (re.compile(r"[^/]+$"), _parse_cached),
)


def reference_key(reference: Reference) -> str:
    """The whole sha256 of the canonical reference: tells apart two references whose short hashes agree."""
    return hashlib.sha256(reference.canonical.encode()).hexdigest()


def _hashed_name(canonical: str, readable: str) -> str:
    """`<12 hex>_<name>.safetensors`, or `lora_<12 hex>.safetensors` when `readable` is no weight file's name."""
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    stem, dot, suffix = readable.rpartition(".")
    safe = re.sub(r"[^A-Za-z0-9._\-]+", "_", stem).strip("._")[:80]
    if not dot or f".{suffix.lower()}" not in WEIGHT_SUFFIXES or not safe:
        return f"lora_{digest}.safetensors"
    return f"{digest}_{safe}.safetensors"
