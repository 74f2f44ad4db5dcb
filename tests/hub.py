"""A model hub on this machine: as much of the Hugging Face hub's API as downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Repository(ThreadingHTTPServer):
    """A repository's files by revision; what of them was fetched is in `fetched`."""

    def __init__(self, name: str, main: str, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.main, self.folders = name, main, folders
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, revision: str) -> dict[str, Path]:
        return {file.name: file for file in self.folders[revision].iterdir() if file.is_file()}

    def info(self, revision: str) -> bytes:
        info = {
            "_id": "1",
            "id": self.name,
            "sha": self.main if revision == "main" else revision,
            "siblings": [{"rfilename": name} for name in self.files(revision)],
            "tags": [],
        }
        return json.dumps(info).encode()

    def tree(self, revision: str) -> bytes:
        entries = [
            {
                "type": "file",
                "path": name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
            for name, file in self.files(revision).items()
        ]
        return json.dumps(entries).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Repository

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, own = self.path.partition("?")[0], self.server
        api, resolve = f"/api/models/{own.name}", f"/{own.name}/resolve/"
        parts = path.removeprefix(api).strip("/").split("/")
        if path.startswith(api) and parts in ([""], ["revision", parts[-1]]):
            return self._send(own.info(parts[-1] or "main"), body)
        if path.startswith(f"{api}/tree/"):
            return self._send(own.tree(parts[1]), body)
        revision, _, name = path.removeprefix(resolve).partition("/")
        if path.startswith(resolve) and name in own.files(revision):
            if body:
                own.fetched.append(name)
            return self._send(own.files(revision)[name].read_bytes(), body, revision=revision)
        return self._send(b"Entry not found", body, 404, {"X-Error-Code": "EntryNotFound"})

    def _send(
        self,
        data: bytes,
        body: bool,
        status: int = 200,
        more: dict[str, str] | None = None,
        revision: str = "main",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.main if revision == "main" else revision)
        self.send_header("Content-Type", "application/json")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


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
    server = Repository(repository, main, {**(older or {}), main: folder, "main": folder})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.url, server.fetched
    finally:
        server.shutdown()
