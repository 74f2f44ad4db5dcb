"""Fake servers: vLLM-like ones, and ones with arbitrary answers."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Golden


class Fake(ThreadingHTTPServer):
    """A vLLM-like server with given log-probabilities."""

    def __init__(self, manifest: Any, logprobs: tuple[float, ...], text: str = "an answer") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifest, self.logprobs, self.text = manifest, logprobs, text
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "m"}]})
        elif self.path == "/sleb/manifest" and self.server.manifest is not None:
            self.answer(self.server.manifest)
        else:
            self.answer({"error": "none"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m"
        assert body["temperature"] == 0
        places = [None, *({"3": {"logprob": value}} for value in self.server.logprobs)]
        text = self.server.text
        choice = {"text": text, "prompt_logprobs": places}
        self.answer({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Hostile(socketserver.ThreadingTCPServer):
    """A server that answers each path with bytes, or as a function does on the bare socket."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HostileHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers: dict[str, Any] = {}
        self.manifest = Path()
        self.sent = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that disconnect."""


class HostileHandler(socketserver.StreamRequestHandler):
    server: Hostile

    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode()
        length = 0
        while (line := self.rfile.readline()).strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        self.rfile.read(length)
        answer = self.server.answers[path]
        for piece in [answer] if isinstance(answer, bytes) else answer():
            self.request.sendall(piece)
            self.server.sent += len(piece)


def http(body: Any, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {size}", *headers, "", "")
    return "\r\n".join(lines).encode() + data


def chunked(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def drip(start: bytes, piece: bytes, seconds: float = 0.02) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(seconds)
            yield piece

    return pieces


MODELS, COMPLETIONS, MANIFEST = "/v1/models", "/v1/completions", "/sleb/manifest"
HEAD = b"HTTP/1.1 200 OK\r\n"


GOLDEN = Golden((5, 7, 9), (-1.5, -2.5))


def told(manifest: Path, blocks: int | None = None) -> dict[str, Any]:
    digest = read_manifest(manifest).prefix(blocks).pruning().digest
    return {"digest": digest, "ranks": [{"digest": digest}, {"digest": digest}]}
