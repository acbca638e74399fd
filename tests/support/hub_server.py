"""A stand-in for the Hugging Face Hub's API that the real huggingface_hub talks to.

Serves model_info (/api/models/...), and files under /REPO/resolve/REVISION/PATH with the Hub's own headers; large files
redirect to a CDN on another host, as the Hub's do.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from tests.support.http_server import FileServer, Handler, Reply, sha256, status, whole


@dataclass
class Repo:
    """Files by path at one revision; `gated` asks for `token`; `cdn` names the files that redirect there."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    commit: str = "c0ffee0123456789c0ffee0123456789c0ffee01"
    gated: bool = False
    on_cdn: frozenset[str] = frozenset()


@dataclass
class Hub:
    """The stand-in: `server` is the Hub, `cdn` another host for file contents."""

    server: FileServer
    cdn: FileServer
    token: str = "hf_secret"
    repos: dict[str, Repo] = field(default_factory=dict)
    down: bool = False

    def __post_init__(self) -> None:
        self.server.replies = _Routes(self)

    @property
    def endpoint(self) -> str:
        return self.server.origin

    def add(self, name: str, repo: Repo) -> None:
        self.repos[name] = repo
        for path in repo.on_cdn:
            content = repo.files[path]
            self.cdn.add(f"/cdn/{sha256(content)}", whole(content, etag=f'"{sha256(content)}"'))

    def route(self, path: str) -> Reply:
        if self.down:
            return status(503)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path)
        if tree:
            return self._guarded(tree[1], unquote(tree[2]), "", tree=True)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if api:
            return self._guarded(api[1], unquote(api[2] or "main"), None)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self._guarded(file[1], unquote(file[2]), unquote(file[3]))
        return status(404)

    def _guarded(self, name: str, revision: str, path: str | None, *, tree: bool = False) -> Reply:
        def reply(handler: Handler) -> None:
            (_tree(self.repos[name]) if tree else self._answer(name, revision, path, handler))(handler)

        return reply

    def _answer(self, name: str, revision: str, path: str | None, handler: Handler) -> Reply:
        repo = self.repos.get(name)
        authorized = handler.headers.get("Authorization") == f"Bearer {self.token}"
        if repo is None:
            code = "RepoNotFound"
            return status(404 if authorized else 401, x_error_code=code, x_error_message="Not found")
        if repo.gated and not authorized:
            return status(403, x_error_code="GatedRepo", x_error_message="Access is restricted")
        if revision not in (*repo.revisions, repo.commit):
            return status(404, x_error_code="RevisionNotFound", x_error_message="Invalid rev")
        if path is None:
            info = {
                "id": name,
                "sha": repo.commit,
                "siblings": [{"rfilename": file, "size": len(content)} for file, content in repo.files.items()],
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
            }
            return status(200, json.dumps(info).encode(), content_type="application/json")
        if path not in repo.files:
            return status(404, x_error_code="EntryNotFound", x_error_message="Entry not found")
        return self._file(repo, path)

    def _file(self, repo: Repo, path: str) -> Reply:
        content = repo.files[path]
        headers: dict[str, object] = {"x_repo_commit": repo.commit, "accept_ranges": "bytes"}
        if path in repo.on_cdn:
            location = f"{self.cdn.origin}/cdn/{sha256(content)}?X-Amz-Signature=sig-secret"
            linked: dict[str, object] = {"x_linked_etag": f'"{sha256(content)}"', "x_linked_size": len(content)}
            return lambda handler: handler.start(302, content_length=0, location=location, **headers, **linked)

        def reply(handler: Handler) -> None:
            handler.start(200, content_length=len(content), etag=f'"{sha256(content)[:40]}"', **headers)
            if handler.command != "HEAD":
                handler.wfile.write(content)

        return reply


def _tree(repo: Repo) -> Reply:
    files = [
        {"type": "file", "path": path, "size": len(content), "oid": sha256(content)[:40]}
        for path, content in repo.files.items()
    ]
    return status(200, json.dumps(files).encode(), content_type="application/json")


class _Routes(dict[str, list[Reply]]):
    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self._hub = hub

    def get(self, path: str, default: object = None) -> list[Reply]:
        return [self._hub.route(path)]
