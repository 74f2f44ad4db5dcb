"""Asking running servers: probe and canary against one that is simulated, and select's metrics."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import socket
import socketserver
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli import main as cli
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Golden, Manifest, Removal
from sleb_serve.selection.metrics import SearchMetrics
from sleb_serve.serving import client, probe
from sleb_serve.serving.canary import read_prompts
from sleb_serve.serving.client import parse_address

Models = Callable[[str], Path]

GOLDEN = Golden((5, 7, 9), (-1.5, -2.5))


class Fake(ThreadingHTTPServer):
    """A server that answers as vLLM would, with log-probabilities of our choice."""

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


@pytest.fixture
def serve() -> Iterator[Callable[..., Fake]]:
    servers: list[Fake] = []

    def start(*arguments: Any) -> Fake:
        servers.append(Fake(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def manifest(models: Models, tmp_path: Path) -> Path:
    path = str(models("llama"))
    binding = bind(path, open_checkpoint(path))
    removed = (Removal(3), Removal(1))
    Manifest(binding, removed, golden=GOLDEN).write(tmp_path / "m.json")
    return tmp_path / "m.json"


def told(manifest: Path, blocks: int | None = None) -> dict[str, Any]:
    digest = read_manifest(manifest).prefix(blocks).pruning().digest
    return {"digest": digest, "ranks": [{"digest": digest}, {"digest": digest}]}


def test_a_server_that_computes_the_golden_prompt_is_ready(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(told(manifest), (-1.5, -2.54))
    assert main(["probe", server.url, "-m", str(manifest)]) == 0
    printed = capsys.readouterr().out
    assert "on 2 rank(s)" in printed
    assert "within 0.0200 nats" in printed


def test_a_prefix_has_no_golden_prompt_but_a_digest(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(told(manifest, 1), ())
    assert main(["probe", server.url, "-m", str(manifest), "--blocks", "1"]) == 0
    assert "no golden log-probabilities" in capsys.readouterr().out
    assert main(["probe", server.url, "-m", str(manifest)]) == 1


@pytest.mark.parametrize(
    ("change", "logprobs", "message"),
    [
        ({"digest": "f" * 64}, (-1.5, -2.5), "serves manifest ffffffff, not"),
        ({"ranks": [{"digest": "f" * 64}]}, (-1.5, -2.5), "not every rank serves"),
        ({"ranks": []}, (-1.5, -2.5), "not every rank serves"),
        ({}, (-1.5, -3.5), "0.5000 nats off on average"),
        ({}, (-1.5, math.nan), "NaN is not a JSON number"),
        ({}, (-1.5, -1e300), "is out of range: -1e+300"),
        ({}, (-1.5,), "gave 1 log-probabilities for the golden prompt, not 2"),
    ],
)
def test_a_server_that_serves_something_else_is_not_ready(
    manifest: Path,
    serve: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    logprobs: tuple[float, ...],
    message: str,
) -> None:
    server = serve({**told(manifest), **change}, logprobs)
    assert main(["probe", server.url, "-m", str(manifest)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_dense_server_and_none_at_all_are_not_ready(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(None, ())
    assert main(["probe", server.url, "-m", str(manifest)]) == 1
    assert "a dense model, or a server whose VLLM_PLUGINS" in capsys.readouterr().err
    assert main(["probe", "http://127.0.0.1:9", "-m", str(manifest)]) == 1
    assert "is the server up?" in capsys.readouterr().err
    assert main(["probe", "localhost:8000", "-m", str(manifest)]) == 2
    assert "give the server's address" in capsys.readouterr().err


def test_the_canary_measures_drift(
    serve: Callable[..., Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = serve(None, (-1.0, -2.0), "one two three four")
    pruned = serve(None, (-1.5, -1.8), "one two 3")
    (tmp_path / "p.txt").write_text("a prompt\n\nanother\n")
    arguments = ["canary", "--dense", dense.url, "--pruned", pruned.url]
    prompts = ["--prompts", str(tmp_path / "p.txt"), "--json"]
    assert main([*arguments, *prompts]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx(
        {
            "requests": 2,
            "dense_loss": 1.5,
            "pruned_loss": 1.65,
            "loss_drift": 0.15,
            "logprob_drift": 0.35,
            "same_share": 8 / 18,
            "dense_tokens": 4,
            "pruned_tokens": 3,
        }
    )
    assert main([*arguments, "--requests", "3", "--max-drift", "0.2"]) == 0
    assert "drift +0.1500" in capsys.readouterr().out
    assert main([*arguments, "--requests", "3", "--max-drift", "0.1"]) == 1
    assert "more than 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        (["--requests", "0"], None, "--requests must be at least 1"),
        (["--prompts", "none.txt"], None, "cannot read prompts none.txt"),
        (["--prompts", "p.txt"], b" \n\n", "p.txt: no prompts in it"),
        (["--prompts", "p.txt"], b"\xff", "cannot read prompts p.txt"),
        (["--prompts", "p.jsonl"], b'{"prompt": "a"}\n{', "p.jsonl, line 2: not JSON"),
        (["--prompts", "p.jsonl"], b'\n{"prompt": {"a": 1}}', "p.jsonl, line 2 has no text"),
        (["--prompts", "p.jsonl"], b'["a"]', "p.jsonl, line 1: it must be an object"),
    ],
)
def test_a_canary_without_prompts_is_refused(
    serve: Callable[..., Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(options[-1]).write_bytes(content)
    server = serve(None, (-1.0,))
    assert main(["canary", "--dense", server.url, "--pruned", server.url, *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"text": "c"}\n{"text": "d"}\n')
    assert read_prompts(tmp_path / "p.jsonl", 2) == ["a\u2028b", "c"]
    prompts = read_prompts(None, 100_000)
    assert len(prompts) > 1000
    assert all(prompts)


class Hostile(socketserver.ThreadingTCPServer):
    """A server that answers each path with bytes, or as a function does on the bare socket."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HostileHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers: dict[str, Any] = {}
        self.sent = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that had enough is no error."""


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


def completion(**changes: Any) -> dict[str, Any]:
    """What an honest server answers to a completion, with changes to its one choice."""
    places = [None, {"7": {"logprob": -1.5}}, {"9": {"logprob": -2.5}}]
    choice = {"text": "an answer", "prompt_logprobs": places} | changes
    return {"choices": [choice], "usage": {"completion_tokens": 2}}


def scored(value: str) -> bytes:
    """A completion whose last log-probability is spelled so."""
    return json.dumps(completion()).replace("-2.5", value).encode()


BAD_BODIES: list[bytes] = [
    b"",
    b"null",
    b"true",
    b"3",
    b'"text"',
    b"[]",
    b"[{}]",
    b"{}",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"{",
    b'{"data": [',
    b'{"data": [{"id": "m"}]} and more',
    b'{"data": [{"id": "m"}], "data": [{"id": "m"}]}',
    b"[" * 100_000,
    b'{"data":' * 100_000,
    b'{"data": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"data": [{"id": "\\ud800"}]}',
    b"\xff\xfe{",
    b"\x00" * 10,
    '{"data": [{"id": "m"}]}'.encode("utf-16"),
    b"<!DOCTYPE html><html><body>It works!</body></html>",
    gzip.compress(b'{"data": [{"id": "m"}]}', mtime=0),
]
BAD_MODELS: list[Any] = [
    {"data": value}
    for value in (
        *(None, "m", 3, True, {"0": {"id": "m"}}, [], [None], [3], ["m"], [[]], [{}]),
        *([{"id": name}] for name in (None, 3, True, "", "a\nb", "\x1b[2J", ["m"], {})),
    )
]
BAD_COMPLETIONS: list[Any] = [
    *({**completion(), "choices": value} for value in (None, "text", 3, {}, [], [None], [3], [[]])),
    *(completion(text=value) for value in (None, 3, True, ["a"], {})),
    *(completion(prompt_logprobs=value) for value in ("x", 3, True, {}, {"7": {"logprob": -1}})),
    *(
        completion(prompt_logprobs=[None, {"7": {"logprob": -1.5}}, value])
        for value in (None, 3, "x", [], {}, {"9": None}, {"9": -2.5}, {"9": []}, {"9": {}})
    ),
    *({**completion(), "usage": value} for value in (None, 3, [], {}, "x")),
    *(
        {**completion(), "usage": {"completion_tokens": value}}
        for value in (None, True, "2", 1.5, -1, 10**15, 10**19, [])
    ),
    *map(
        scored,
        (
            *("null", "true", '"-2.5"', "[]", "{}", "NaN", "Infinity", "-Infinity"),
            *("1e999", "-1e999", "1e308", "-1e308", "1" + "0" * 19, "1" + "0" * 5000),
        ),
    ),
    {"error": {"message": "no"}},
]
BAD_MANIFESTS: list[Any] = [
    *({"digest": value, "ranks": []} for value in (None, 3, True, [], {}, "", "a\nb", "f" * 64)),
    *({"ranks": value} for value in ([], None)),
    *(
        {"digest": "DIGEST", "ranks": value}
        for value in (
            *(None, 3, True, "abc", {}, {"digest": "DIGEST"}, [], [3], [None], ["DIGEST"], [[]]),
            *([{"digest": digest}] for digest in (None, 3, [], {}, "", "f" * 64)),
            [{"digest": "DIGEST"}, {}],
        )
    ),
]
BAD_HTTP: dict[str, Any] = {
    "nothing": b"",
    "text": b"hello there",
    "no status": b"HTTP/1.1\r\n\r\n",
    "status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "status of five digits": b"HTTP/1.1 99999 OK\r\n\r\n",
    "unknown version": b"HTTP/9.9 200 OK\r\n\r\n",
    "control characters": b"\x1b[2J\x07 400\r\n\r\n",
    "endless status line": b"HTTP/1.1 200 " + b"x" * 200_000,
    "a header of megabytes": HEAD + b"X: " + b"x" * 2_000_000,
    "thousands of headers": HEAD + b"X: y\r\n" * 5000 + b"\r\n",
    "headers cut short": HEAD + b"Content-Le",
    "only continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "switching protocols": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "body cut short": http({"data": [{"id": "m"}]}, length=500),
    "body of 10^30 bytes": http({"data": [{"id": "m"}]}, length=10**30),
    "chunks that end early": chunked(b'17\r\n{"data": '),
    "no last chunk": chunked(b'17\r\n{"data": [{"id": "m"}]}\r\n'),
    "a size of letters": chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "a negative size": chunked(b"-5\r\n{}\r\n0\r\n\r\n"),
    "a chunk of 2^80 bytes": chunked(b"1" + b"0" * 20 + b"\r\n{}"),
    "gzip": http(gzip.compress(b"{}", mtime=0), "200 OK", "Content-Encoding: gzip"),
    "deflate": http(b"{}", "200 OK", "Content-Encoding: deflate"),
    "a gzip bomb": http(
        gzip.compress(b" " * (1 << 24), mtime=0), "200 OK", "Content-Encoding: gzip"
    ),
    "redirect to nowhere": http(b"", "301 Moved"),
    "redirect to another host": http(b"", "302 Found", "Location: http://192.0.2.1/v1/models"),
    "redirect to a bad port": http(b"", "307 Moved", "Location: http://localhost:99999999/"),
    "redirect with a password": http(b"", "308 Moved", "Location: http://me:hunter2@localhost/"),
    "redirect to itself": http(b"", "308 Moved", "Location: /v1/models"),
    "redirect with escapes": http(b"", "303 See", "Location: http://a/\x1b[2J"),
    "bad request": http({"error": {"message": "no"}}, "400 Bad Request"),
    "unauthorised": http({"error": "Unauthorized"}, "401 Unauthorized"),
    "not found": http({"detail": "Not Found"}, "404 Not Found"),
    "busy": http(b"", "429 Too Many Requests"),
    "error with escapes": http(b"\x1b[2J\r\nsleb-serve: \xff\xe2\x80\xae", "500 Error"),
    "a page of errors": http(b"<html>\n" * 100_000, "500 Error"),
    "error cut short": http(b"starting", "503 Unavailable", length=100),
    "unknown status": http(b"{}", "999 What"),
    "endless": drip(HEAD + b"\r\n[", b"1," * 100_000, 0),
    "endless chunks": drip(chunked(b""), b"ff\r\n" + b" " * 255 + b"\r\n", 0),
    "endless error": drip(b"HTTP/1.1 500 Error\r\n\r\n", b"no " * 1000, 0),
}
SLOW: dict[str, Any] = {
    "silent": drip(b"", b""),
    "slow status": drip(b"HTTP/1.1 200 ", b"x"),
    "slow headers": drip(HEAD, b"X: y\r\n"),
    "slow body": drip(HEAD + b"\r\n[", b"1,"),
    "slow chunks": drip(chunked(b""), b"1\r\n \r\n"),
    "slow error": drip(b"HTTP/1.1 500 Error\r\n\r\n", b"x"),
    "endless continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless trailers": drip(chunked(b"0\r\n"), b"X: y\r\n"),
}
BAD_ANSWERS = [
    *(pytest.param(MODELS, http(body), id=f"body {i}") for i, body in enumerate(BAD_BODIES)),
    *(pytest.param(COMPLETIONS, http(body), id=f"answer {i}") for i, body in enumerate(BAD_BODIES)),
    *(pytest.param(MODELS, http(body), id=f"models {i}") for i, body in enumerate(BAD_MODELS)),
    *(
        pytest.param(COMPLETIONS, http(body), id=f"completion {i}")
        for i, body in enumerate(BAD_COMPLETIONS)
    ),
    *(pytest.param(MODELS, answer, id=name) for name, answer in BAD_HTTP.items()),
]


@pytest.fixture(scope="module")
def hostile(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    path = str(models("llama"))
    manifest = Manifest(bind(path, open_checkpoint(path)), (Removal(3), Removal(1)), golden=GOLDEN)
    server = Hostile()
    server.manifest = tmp_path_factory.mktemp("hostile") / "m.json"
    manifest.write(server.manifest)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def honest(hostile: Hostile) -> Hostile:
    """The hostile server, answering as it should so far."""
    hostile.sent = 0
    hostile.answers = {
        MODELS: http({"data": [{"id": "m"}]}),
        COMPLETIONS: http(completion()),
        MANIFEST: http(told(hostile.manifest)),
    }
    return hostile


def refused_line(
    arguments: list[str], code: int, start: str, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that a command ends with."""
    assert main(arguments) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert error.endswith("\n")
    # Before the line, a progress bar came and went.
    line = error[:-1].rpartition("\r")[2]
    assert error.count("\n") == 1
    assert line.startswith(start)
    assert line.isprintable()
    assert len(line) < 600
    return line


def probe_of(server: Hostile, url: str = "") -> list[str]:
    return ["probe", url or server.url, "-m", str(server.manifest)]


def canary_of(dense: str, pruned: str) -> list[str]:
    return ["canary", "--dense", dense, "--pruned", pruned, "--requests", "2"]


def test_there_are_enough_broken_answers() -> None:
    assert len(BAD_ANSWERS) > 60
    assert len({str(answer.values) for answer in BAD_ANSWERS}) == len(BAD_ANSWERS)


def test_the_hostile_server_can_be_honest(
    honest: Hostile, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(probe_of(honest)) == 0
    assert main(canary_of(serve(None, (-1.0, -2.0)).url, honest.url)) == 0
    honest.answers[MODELS] = chunked(b'17\r\n{"data": [{"id": "m"}]}\r\n0\r\n\r\n')
    assert main(probe_of(honest)) == 0
    assert "drift" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "answer"), BAD_ANSWERS)
def test_a_broken_answer_is_one_line_of_both_commands(
    honest: Hostile,
    serve: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
    path: str,
    answer: Any,
) -> None:
    honest.answers[path] = answer
    lines = [
        refused_line(probe_of(honest), 1, "not ready: ", capsys),
        refused_line(
            canary_of(serve(None, (-1.0, -2.0)).url, honest.url), 2, "sleb-serve: error: ", capsys
        ),
    ]
    for line in lines:
        assert honest.url in line or "not the same model" in line
        assert "hunter2" not in line
    # Ten times what is read before an answer counts as endless: what the sockets' buffers hold.
    assert honest.sent < 10 * client.MAX_BYTES


@pytest.mark.parametrize("body", BAD_MANIFESTS + BAD_BODIES, ids=lambda body: ascii(body)[:30])
def test_a_broken_manifest_is_one_line(
    honest: Hostile, capsys: pytest.CaptureFixture[str], body: Any
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    digest = told(honest.manifest)["digest"].encode()
    honest.answers[MANIFEST] = http(data.replace(b"DIGEST", digest))
    assert honest.url in refused_line(probe_of(honest), 1, "not ready: ", capsys)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": any_json,
            "digest": any_json,
            "ranks": any_json,
            "choices": any_json | st.lists(st.fixed_dictionaries({"text": st.text()}) | any_json),
            "usage": any_json | st.fixed_dictionaries({"completion_tokens": any_json}),
        },
    )
)
def test_any_json_is_read_or_refused(answer: dict[str, Any]) -> None:
    for read in (client._first_model, client._completion, probe._read_served):
        with contextlib.suppress(SlebError):
            read(answer)


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_an_answer_that_never_ends_is_given_up(
    honest: Hostile,
    serve: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.5)
    honest.answers[COMPLETIONS] = honest.answers[MANIFEST] = answer
    started = time.monotonic()
    refused_line(probe_of(honest), 1, "not ready: ", capsys)
    arguments = canary_of(serve(None, (-1.0, -2.0)).url, honest.url)
    refused_line(arguments, 2, "sleb-serve: error: ", capsys)
    assert time.monotonic() - started < 10


BAD_ADDRESSES = [
    *("", " ", "localhost", "localhost:8000", "8000", "/tmp/vllm.sock", "unix:///tmp/vllm.sock"),
    *("http+unix://%2Ftmp%2Fvllm.sock/", "ftp://localhost", "file:///etc/passwd", "http:"),
    *("http://", "http:///v1", "http://:8000", "http:localhost", "://localhost", "http//localhost"),
    *("http://localhost:99999", "http://localhost:-1", "http://localhost:port"),
    *("http://localhost:8000:8000", "http://localhost:8e3", "http://localhost:\u0663"),
    *("http://[::1", "http://::1]", "http://[::1]:x", "http://[::g]", "http://[localhost]"),
    *("http://local host", "http://localhost /", " http://localhost", "http://localhost\n"),
    *("http://localhost\x00", "http://localhost/\x1b[2J", "http://\u00a0localhost"),
    *("http://me:hunter2@localhost", "http://me:hunter2@", "me:hunter2@localhost:8000"),
    *("http://me:hunter2@[::1", "http://hunter2/@localhost:8000", "http://me:hunter2@a:b@c:9"),
    *("https://me:hun#hunter2@localhost", "http://me:hunter2/8@localhost:99999"),
    *("http://localhost:8000?key=1", "http://localhost:8000/#models", "http://a..b"),
    *("http://" + "a" * 70 + ".example", "http://\u2100.example", "http://\ud800.example"),
]


@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=ascii)
def test_what_is_no_address_is_refused_in_one_line(
    hostile: Hostile, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    for arguments in (
        ["probe", address, "-m", str(hostile.manifest)],
        canary_of(hostile.url, address),
        canary_of(address, hostile.url),
    ):
        line = refused_line(arguments, 2, "sleb-serve: error: ", capsys)
        assert "as http://localhost:8000" in line
        assert "hunter2" not in line


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("HTTP://LocalHost", "http://localhost"),
        ("https://a.example:443/base", "https://a.example/base"),
        ("http://b\u00fccher.example:80/\u00e9", "http://xn--bcher-kva.example/%C3%A9"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://a:0", "http://a:0"),
    ],
)
def test_an_address_is_read(address: str, url: str) -> None:
    assert parse_address(address).url == url


def test_an_address_where_nobody_is(
    hostile: Hostile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_names(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for address in ("http://127.0.0.1:1", "https://127.0.0.1:1", "http://[::1]:1", "http://x:0"):
        if "x" in address:
            monkeypatch.setattr(socket, "getaddrinfo", no_names)
        line = refused_line(probe_of(hostile, address), 1, "not ready: ", capsys)
        assert "is the server up?" in line
    with pytest.raises(SlebError, match="Name or service not known"):
        client.Client("http://b\u00fccher.example").model()


def test_a_server_without_tls_is_asked_with_tls(
    honest: Hostile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 2.0)
    url = honest.url.replace("http:", "https:")
    assert url in refused_line(probe_of(honest, url), 1, "not ready: ", capsys)


def test_a_selection_stores_what_the_pruned_model_makes_of_a_prompt_and_shows_its_progress(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}

    class Watched(SearchMetrics):
        """Scrapes itself when the last step is done."""

        def step_ended(self, number: int, step: Any) -> None:
            super().step_ended(number, step)
            url = f"http://127.0.0.1:{self.port}/metrics"
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            for name, value in re.findall(r"^sleb_select_(\w+) (\S+)$", text, re.MULTILINE):
                seen[name] = float(value)

    monkeypatch.setattr(cli, "SearchMetrics", Watched)
    path, output = models("llama"), tmp_path / "m.json"
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    arguments = ["select", str(path), "-o", str(output), "--remove", "2", *text]
    assert main([*arguments, "--metrics-port", "0"]) == 0

    found = read_manifest(output)
    assert seen["steps_total"] == 2
    assert seen["last_block"] == found.removed[-1].block
    assert seen["loss"] == pytest.approx(found.removed[-1].loss)
    assert seen["candidates"] == 5  # of 8 blocks one is gone, and two are barriers
    assert seen["layer_tokens_total"] == 32 * seen["layer_runs_total"] > 0

    assert found.golden is not None
    assert len(found.golden.tokens) == 32
    model = oracle.pruned(path, found.blocks)
    expected = oracle.prompt_logprobs(model, list(found.golden.tokens))
    assert found.golden.logprobs == pytest.approx(expected, abs=2e-4)
    assert found.prefix(2).golden == found.golden
    assert found.prefix(1).golden is None


def test_a_port_that_is_taken_is_refused(
    models: Models, tmp_path: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(None, ())
    arguments = ["select", str(models("llama")), "-o", str(tmp_path / "m.json"), "--remove", "2"]
    assert main([*arguments, "--metrics-port", str(server.server_port)]) == 2
    assert f"--metrics-port {server.server_port}: " in capsys.readouterr().err
