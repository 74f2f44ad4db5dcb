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
    fetched: list[str] = []
    folders = {**(older or {}), main: folder, "main": folder}

    def files(revision: str) -> dict[str, Path]:
        return {file.name: file for file in folders[revision].iterdir() if file.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            api, resolve = f"/api/models/{repository}", f"/{repository}/resolve/"
            parts = path.removeprefix(api).strip("/").split("/")
            if path.startswith(api) and parts in ([""], ["revision", parts[-1]]):
                return self._send(self._info(parts[-1] or "main"), body)
            if path.startswith(f"{api}/tree/"):
                entries = [
                    {
                        "type": "file",
                        "path": name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name, file in files(parts[1]).items()
                ]
                return self._send(json.dumps(entries).encode(), body)
            revision, _, name = path.removeprefix(resolve).partition("/")
            if path.startswith(resolve) and name in files(revision):
                if body:
                    fetched.append(name)
                return self._send(files(revision)[name].read_bytes(), body, revision=revision)
            self._send(b"Entry not found", body, 404, {"X-Error-Code": "EntryNotFound"})
            return None

        def _info(self, revision: str) -> bytes:
            info = {
                "_id": "1",
                "id": repository,
                "sha": main if revision == "main" else revision,
                "siblings": [{"rfilename": name} for name in files(revision)],
                "tags": [],
            }
            return json.dumps(info).encode()

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
            self.send_header("X-Repo-Commit", main if revision == "main" else revision)
            self.send_header("Content-Type", "application/json")
            for name, value in (more or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
