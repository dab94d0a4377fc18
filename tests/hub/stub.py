"""The Hub on loopback: as much of its HTTP API as pushes and downloads of a model repo take.

Written after what `huggingface_hub` 0.34 and 2.4 ask: `create_repo`, `create_branch`,
`create_commit` with its LFS uploads, `repo_info`, `list_repo_tree`, and downloads of files.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

Files = Mapping[str, bytes]

IN_LFS = ("*.safetensors", "*.tensors", "*.bin")


def is_in_lfs(name: str) -> bool:
    """Whether the Hub keeps a file in its LFS storage."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in IN_LFS)


def etag_of(name: str, data: bytes) -> str:
    """What the Hub calls the content of a file: the LFS oid, or the id of the git blob."""
    if is_in_lfs(name):
        return hashlib.sha256(data).hexdigest()
    return git_blob(data)


def git_blob(data: bytes) -> str:
    """The id of content in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@attrs.define
class Repo:
    """A repo of the Hub.

    Attributes:
        commits: The files of each commit.
        branches: The commit of each branch.
        is_gated: Whether only those may download that were granted access.
    """

    commits: dict[str, Files] = attrs.field(factory=dict)
    branches: dict[str, str] = attrs.field(factory=dict)
    is_gated: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make a commit of these files alone, and have a branch point at it."""
        number = len(self.commits) + 1
        name = git_blob(f"{branch} {number}".encode())
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def files(self, branch: str = "main") -> Files:
        """The files of a branch."""
        return self.commits[self.branches[branch]]


@attrs.define
class Hub:
    """The Hub, as tests see it.

    Attributes:
        endpoint: Its address.
        repos: Its repos, by their ids.
        asked: Every request, such as ``"GET /user/adapter/resolve/main/config.json"``.
        before_file: Called with the name of each file before it is served.
        is_down: Whether every request is answered with an error of the server.
    """

    endpoint: str = ""
    repos: dict[str, Repo] = attrs.field(factory=dict)
    asked: list[str] = attrs.field(factory=list)
    before_file: Callable[[str], object] = lambda _: None
    is_down: bool = False
    uploads: dict[str, bytes] = attrs.field(factory=dict)

    def repo(self, name: str, files: Files | None = None) -> Repo:
        """The repo of an id, made if there is none, with a commit of these files if any."""
        repo = self.repos.setdefault(name, Repo())
        if files is not None or not repo.commits:
            repo.commit(files or {})
        return repo

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for."""
        found = (re.match(r"GET /[^?]+/resolve/[^/]+/(.+)", line) for line in self.asked)
        return [urllib.parse.unquote(match[1]) for match in found if match]


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers for the time of a ``with`` statement."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):  # noqa: N818 - an answer
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", answer: Any = None) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.answer = answer or {}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Answer as for GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer for a repo, the list of its files, or a file."""
        self._answer_with(
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        )

    def do_POST(self) -> None:
        """Make a repo, a branch or a commit, or say how files are uploaded."""
        self._answer_with(
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        )

    def do_PUT(self) -> None:
        """Take a file for the LFS storage."""
        self._answer_with((r"/lfs/([0-9a-f]{64})", self._lfs_object))

    def _answer_with(self, *routes: tuple[str, Callable[..., Any]]) -> None:
        """Answer with what the first route that fits gives."""
        path, _, query = self.path.partition("?")
        self.hub.asked.append(f"{self.command} {self.path}")
        self.body = self._read_body()
        self.query = urllib.parse.parse_qs(query)
        try:
            if self.hub.is_down:
                raise _Refused(503)
            for pattern, answer in routes:
                if match := re.fullmatch(pattern, path):
                    self._send(
                        answer(*(part and urllib.parse.unquote(part) for part in match.groups()))
                    )
                    return
            raise _Refused(404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send_bytes(refused.status, json.dumps(refused.answer).encode(), headers)

    def _read_body(self) -> bytes:
        """What came with the request, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Any) -> None:
        """Send JSON, or a file."""
        if isinstance(answer, tuple):
            self._send_bytes(200, *answer)
        else:
            self._send_bytes(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_bytes(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _found(self, name: str, revision: str | None = None) -> tuple[Repo, str]:
        """A repo, and the commit that a revision of it is."""
        repo = self.hub.repos.get(name)
        if repo is None:
            raise _Refused(404, "RepoNotFound")
        revision = revision or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound")
        return repo, commit

    def _info(self, name: str, revision: str | None) -> Any:
        repo, commit = self._found(name, revision)
        siblings = [{"rfilename": file} for file in repo.commits[commit]]
        return {"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings}

    def _tree(self, name: str, revision: str) -> Any:
        repo, commit = self._found(name, revision)
        entries = []
        for file, data in repo.commits[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data)}
            entry["oid"] = git_blob(data)
            if is_in_lfs(file):
                oid = etag_of(file, data)
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _file(self, name: str, revision: str, file: str) -> tuple[bytes, Mapping[str, str]]:
        repo, commit = self._found(name, revision)
        if repo.is_gated:
            raise _Refused(403 if "Authorization" in self.headers else 401, "GatedRepo")
        self.hub.before_file(file)
        data = repo.commits[commit].get(file)
        if data is None:
            raise _Refused(404, "EntryNotFound")
        etag = etag_of(file, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "none"}
        if is_in_lfs(file):
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return data, headers

    def _create(self) -> Any:
        asked = json.loads(self.body)
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else asked["name"]
        )
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"}
        if name in self.hub.repos:
            raise _Refused(409, answer=answer)
        self.hub.repo(name)
        return answer

    def _branch(self, name: str, branch: str) -> Any:
        repo, commit = self._found(name)
        if branch in repo.branches:
            raise _Refused(409)
        repo.branches[branch] = commit
        return {}

    def _preupload(self, name: str, revision: str) -> Any:
        self._found(name, revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_in_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def _lfs_batch(self, name: str) -> Any:
        self._found(name)
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}
            for item in json.loads(self.body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _lfs_object(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(422)
        self.hub.uploads[oid] = self.body
        return {}

    def _commit(self, name: str, branch: str) -> Any:
        repo, parent = self._found(name, branch)
        files = dict(repo.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, branch)
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Say nothing."""
