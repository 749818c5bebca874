"""A small Hugging Face hub: what `huggingface_hub` asks for, repositories in memory.

Every write is a new commit, and old commits stay readable, as on the hub. Files of `lfs_from` bytes
and more are LFS: their tree entries carry a sha256 and their resolve URL redirects to signed URLs at
another host name, which expire after `signature_uses` requests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, unquote

from support.http_service import HttpService, Request, Response, serve_bytes


@dataclass(slots=True)
class Repository:
    """`commits` maps a commit to its files; `refs` a branch or tag to a commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name


class FakeHub(HttpService):
    """`repositories` is {"models/org/name": Repository}.

    Attributes:
        readers: tokens that may read private and gated repositories.
        signature_uses: how many requests a signed URL is good for; None for ever.
        damaged: what the CDN serves in place of a blob, by its sha256.
    """

    def __init__(self, lfs_from: int = 1000, page: int = 3) -> None:
        super().__init__()
        self.repositories: dict[str, Repository] = {}
        self.readers: set[str] = set()
        self.signature_uses: int | None = None
        self.damaged: dict[str, bytes] = {}
        self._lfs_from = lfs_from
        self._page = page
        self._blobs: dict[str, bytes] = {}
        self._signed: dict[str, int] = {}

    def repository(self, name: str) -> Repository:
        """The repository `name` ("models/org/name"), made if it is missing."""
        with self.lock:
            return self.repositories.setdefault(name, Repository())

    def answer(self, request: Request) -> Response:
        parts = [unquote(p) for p in request.path.strip("/").split("/")]
        if parts[0] == "cdn":
            return self._cdn(parts[1], request)
        if parts[0] == "api":
            return self._api(parts[1], parts[2:], request)
        kind = parts.pop(0) if parts[0] in ("datasets", "spaces") else "models"
        at = parts.index("resolve")
        return self._resolve(
            f"{kind}/{'/'.join(parts[:at])}", parts[at + 1], "/".join(parts[at + 2 :]), request
        )

    def _api(self, kind: str, parts: list[str], request: Request) -> Response:
        verbs = [i for i, part in enumerate(parts) if part in ("revision", "tree", "paths-info")]
        at = verbs[0] if verbs else len(parts)
        name = f"{kind}/{'/'.join(parts[:at])}"
        verb = parts[at] if verbs else "revision"
        wanted = parts[at + 1] if at + 1 < len(parts) else "main"
        found = self._find(name, wanted, request, listing=True)
        if isinstance(found, Response):
            return found
        commit, files = found
        if verb == "revision":
            repository = {"id": name.partition("/")[2], "sha": commit, "private": False, "tags": []}
            return _json({**repository, "siblings": [{"rfilename": path} for path in sorted(files)]})
        if verb == "paths-info":
            asked = parse_qs(request.body.decode())["paths"]
            return _json([e for e in self._entries(files) if e["path"] in asked])
        return self._tree(files, "/".join(parts[at + 2 :]), request)

    def _tree(self, files: dict[str, bytes], folder: str, request: Request) -> Response:
        entries = [e for e in self._entries(files) if not folder or str(e["path"]).startswith(f"{folder}/")]
        if not entries:
            return _error(404, "EntryNotFound", "Entry not found")
        if request.query.get("recursive", "").lower() != "true":
            depth = folder.count("/") + 1 if folder else 0
            entries = [e for e in entries if str(e["path"]).count("/") == depth]
        start = int(request.query.get("cursor", 0))
        headers = {}
        if start + self._page < len(entries):
            base = f"{self.url}{request.path}?recursive={request.query.get('recursive', 'False')}"
            headers["Link"] = f'<{base}&expand=False&cursor={start + self._page}>; rel="next"'
        return _json(entries[start : start + self._page], headers)

    def _entries(self, files: dict[str, bytes]) -> list[dict[str, object]]:
        entries: dict[str, dict[str, object]] = {}
        for path, data in files.items():
            parts = path.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                entries[folder] = {
                    "type": "directory",
                    "oid": _git_id(folder.encode()),
                    "size": 0,
                    "path": folder,
                }
            entries[path] = {"type": "file", "oid": _git_id(data), "size": len(data), "path": path}
            if len(data) >= self._lfs_from:
                digest = hashlib.sha256(data).hexdigest()
                entries[path]["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 135}
        return [entries[path] for path in sorted(entries)]

    def _resolve(self, name: str, revision: str, path: str, request: Request) -> Response:
        found = self._find(name, revision, request, listing=False)
        if isinstance(found, Response):
            return found
        commit, files = found
        data = files.get(path)
        if data is None:
            return _error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(data) < self._lfs_from:
            return serve_bytes(request, data, {**headers, "ETag": f'"{_git_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        self._blobs[digest] = data
        signature = f"s{len(self._signed)}/+="
        self._signed[signature] = 0
        host = self.url.replace("127.0.0.1", "localhost")
        asked = f"response-content-disposition=inline%3B&Signature={quote(signature, safe='')}"
        return Response(
            302,
            b"",
            {
                **headers,
                "ETag": f'"{digest}"',
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{host}/cdn/{digest}?{asked}",
            },
        )

    def _cdn(self, digest: str, request: Request) -> Response:
        """The CDN refuses a hub token (as S3 refuses a second kind of authorization) and old signatures."""
        signature = request.query.get("Signature", "")
        if "authorization" in request.headers:
            return Response(400, b"<Error><Code>InvalidArgument</Code></Error>")
        if signature not in self._signed:
            return Response(403, b"<Error><Code>AccessDenied</Code></Error>")
        self._signed[signature] += 1
        if self.signature_uses is not None and self._signed[signature] > self.signature_uses:
            return Response(
                403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
            )
        return serve_bytes(
            request, self.damaged.get(digest, self._blobs[digest]), {"ETag": f'"{digest[:32]}"'}
        )

    def _find(
        self, name: str, revision: str, request: Request, *, listing: bool
    ) -> tuple[str, dict[str, bytes]] | Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token not in self.readers):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and token not in self.readers and not listing:
            return _error(403 if token else 401, "GatedRepo", "Access to this model is restricted.")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


def _json(value: object, headers: dict[str, str] | None = None) -> Response:
    return Response(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _error(status: int, code: str, message: str) -> Response:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return Response(status, json.dumps({"error": message}).encode(), headers)
