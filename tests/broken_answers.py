"""Invalid server answers and invalid addresses."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from fake_servers import COMPLETIONS, HEAD, MODELS, chunked, drip, http


def completion(**changes: Any) -> dict[str, Any]:
    """A valid completion answer, with changes to its choice."""
    places = [None, {"7": {"logprob": -1.5}}, {"9": {"logprob": -2.5}}]
    choice = {"text": "an answer", "prompt_logprobs": places} | changes
    return {"choices": [choice], "usage": {"completion_tokens": 2}}


def scored(value: str) -> bytes:
    """A completion with this text as its last log-probability."""
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


BAD_ADDRESSES = [
    *("", " ", "localhost", "localhost:8000", "8000", "/tmp/vllm.sock", "unix:///tmp/vllm.sock"),
    *("http+unix://%2Ftmp%2Fvllm.sock/", "ftp://localhost", "file:///etc/passwd", "http:"),
    *("http://", "http:///v1", "http://:8000", "http:localhost", "://localhost", "http//localhost"),
    *("http://localhost:99999", "http://localhost:-1", "http://localhost:port"),
    *("http://localhost:8000:8000", "http://localhost:8e3", "http://localhost:\u0663"),
    *("http://[::1", "http://::1]", "http://[::1]:x", "http://[::g]", "http://[localhost]"),
    *("http://local host", "http://localhost /", " http://localhost", "http://localhost\n"),
    *(
        "http://localhost\x00",
        "http://me:hunter2@localhost\x00",
        "http://localhost/\x1b[2J",
        "http://\u00a0localhost",
    ),
    *("http://me:hunter2@localhost", "http://me:hunter2@", "me:hunter2@localhost:8000"),
    *("http://me:hunter2@[::1", "http://hunter2/@localhost:8000", "http://me:hunter2@a:b@c:9"),
    *("https://me:hun#hunter2@localhost", "http://me:hunter2/8@localhost:99999"),
    *("http://localhost:8000?key=1", "http://localhost:8000/#models", "http://a..b"),
    *("http://" + "a" * 70 + ".example", "http://\u2100.example", "http://\ud800.example"),
]
