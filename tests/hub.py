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
def serving(repository: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repository`.

    Yields:
        The hub's address, for ``HF_ENDPOINT``, and the names of the files that were fetched.
    """
    fetched: list[str] = []
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    entries = [{"type": "file", "path": n, "size": f.stat().st_size} for n, f in files.items()]
    for entry in entries:
        entry["oid"] = hashlib.sha1(str(entry["path"]).encode()).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            api = f"/api/models/{repository}"
            if path.startswith(f"{api}/tree/"):
                return self._send(json.dumps(entries).encode(), body)
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                info = {
                    "_id": "1",
                    "id": repository,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in files],
                    "tags": [],
                }
                return self._send(json.dumps(info).encode(), body)
            name = path.rpartition("/")[2]
            if path.startswith(f"/{repository}/resolve/") and name in files:
                if body:
                    fetched.append(name)
                return self._send(files[name].read_bytes(), body)
            self._send(b"Entry not found", body, 404, {"X-Error-Code": "EntryNotFound"})
            return None

        def _send(
            self, data: bytes, body: bool, status: int = 200, more: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
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
