"""A local model hub with the parts of the Hugging Face API that the library needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes | Path]


class Repository:
    """A repository: the files of each commit, and the commits of each name."""

    def __init__(self, commits: dict[str, Files], main: str, private: bool = False) -> None:
        self.commits, self.private = commits, private
        self.names = {"main": main}

    def commit(self, revision: str) -> str | None:
        found = self.names.get(revision, revision)
        return found if found in self.commits else None


class Hub(ThreadingHTTPServer):
    """Repositories by name; the names of the files that were fetched are in `fetched`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_PUT(self) -> None:
        data = self._body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.server.objects[digest] = data
        self._send(b"", True)

    def do_POST(self) -> None:
        parts, data = self._parts(), self._body()
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(data))
        if parts == ["api", "validate-yaml"]:
            return self._json({})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(json.loads(data))
        _, _, *name, what, revision = parts
        own = self.server.repositories["/".join(name)]
        if what == "branch":
            status = 409 if revision in own.names else 200
            own.names.setdefault(revision, own.names["main"])
            return self._json({}, status)
        if what == "preupload":
            return self._preupload(json.loads(data))
        assert what == "commit"
        lines = [json.loads(line) for line in data.splitlines()]
        url = f"{self.server.url}/{'/'.join(name)}"
        return self._json(self._commit(own, revision, lines, url))

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.repositories
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository({COMMIT: {}}, COMMIT, private)
        self._json({"url": f"{self.server.url}/{name}"}, 409 if known else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        def action(oid: str) -> dict[str, Any]:
            return {"upload": {"href": f"{self.server.url}/lfs/{oid}", "header": {}}}

        objects = [{**entry, "actions": action(entry["oid"])} for entry in asked["objects"]]
        self._json({"transfer": "basic", "objects": objects})

    def _preupload(self, asked: dict[str, Any]) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
            for f in asked["files"]
        ]
        self._json({"files": files})

    def _commit(
        self, own: Repository, revision: str, lines: list[dict[str, Any]], url: str
    ) -> dict[str, Any]:
        files = dict(own.commits[own.names[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(repr((len(own.commits), sorted(files))).encode()).hexdigest()
        own.commits[commit] = files
        own.names[revision] = commit
        return {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}"}

    def _get(self, body: bool) -> None:
        parts = self._parts()
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        own = self.server.repositories.get(name)
        if own is None:
            return self._missing("RepoNotFound", body)
        what, revision, *path = [*(parts[4:] if api else parts[2:]), "main", "main"]
        if what == "main":
            revision = "main"
        commit = own.commit(revision)
        if commit is None:
            return self._missing("RevisionNotFound", body)
        files = own.commits[commit]
        if api:
            found = _tree(files) if what == "tree" else _info(name, own, commit)
            return self._send(json.dumps(found).encode(), body, commit=commit)
        file = "/".join(path[:-2])
        if file not in files:
            return self._missing("EntryNotFound", body, commit)
        if body:
            self.server.fetched.append(file)
        return self._send(_content(files[file]), body, commit=commit)

    def _parts(self) -> list[str]:
        return [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _missing(self, code: str, body: bool, commit: str = COMMIT) -> None:
        self._send(b"not found", body, 404, commit, {"X-Error-Code": code})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), True, status)

    def _send(
        self,
        data: bytes,
        body: bool,
        status: int = 200,
        commit: str = COMMIT,
        more: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", "application/json")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def _content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _info(name: str, own: Repository, commit: str) -> dict[str, Any]:
    return {
        "_id": "1",
        "id": name,
        "sha": commit,
        "private": own.private,
        "siblings": [{"rfilename": file} for file in own.commits[commit]],
        "tags": [],
    }


def _tree(files: Files) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": name,
            "size": len(_content(file)),
            "oid": hashlib.sha1(name.encode()).hexdigest(),
        }
        for name, file in files.items()
    ]


def files_of(folder: Path) -> Files:
    return {file.name: file for file in folder.iterdir() if file.is_file()}


@contextmanager
def running() -> Iterator[Hub]:
    """An empty hub that tests can fill."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(
    repository: str, folder: Path, main: str = COMMIT, older: dict[str, Path] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repository`.

    Args:
        repository: ``organisation/name``.
        folder: what the branch main holds.
        main: the commit it points to.
        older: folders of other commits.

    Yields:
        The hub's address, for ``HF_ENDPOINT``, and the names of the files that were fetched.
    """
    with running() as hub:
        folders = {**(older or {}), main: folder}
        commits = {commit: files_of(path) for commit, path in folders.items()}
        hub.repositories[repository] = Repository(commits, main)
        yield hub.url, hub.fetched


def environment(address: str, cache: Path) -> dict[str, str]:
    """Environment for using the hub at `address` with a separate cache."""
    return {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
