"""Broken answers: `probe` and `canary` report them in one line, quickly, without passwords."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broken_answers import BAD_ADDRESSES, BAD_ANSWERS, BAD_BODIES, BAD_MANIFESTS, SLOW, completion
from conftest import Models
from fake_servers import COMPLETIONS, GOLDEN, MANIFEST, MODELS, Fake, Hostile, chunked, http, told
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.serving import client, probe
from sleb_serve.serving.address import parse_address


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
        no_text = "\x00" in address or "\ud800" in address
        assert ("which is not valid text" if no_text else "as http://localhost:8000") in line
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


_LIMITED = """
import resource, sys
from sleb_serve.cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
sys.exit(main(["probe", sys.argv[1], "-m", sys.argv[2]]))
"""
LARGE: dict[str, Any] = {
    "lists": b"[" + b"[]," * (client.MAX_BYTES // 3 - 2) + b"[]]",
    "keys": b"{" + b",".join(b'"%x":0' % i for i in range(client.MAX_BYTES // 12)) + b"}",
    "nested": b"[" * client.MAX_BYTES,
    "letters": b'"' + b"x" * (client.MAX_BYTES - 2) + b'"',
}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name, marks=[pytest.mark.slow] if name in ("lists", "keys") else [])
        for name, body in LARGE.items()
    ],
)
def test_the_largest_answers_fit_into_a_gibibyte(honest: Hostile, body: bytes) -> None:
    honest.answers[MANIFEST] = http(body)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, honest.url, str(honest.manifest)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr[-500:]
    assert done.stderr.startswith("not ready: ")
    assert done.stderr.count("\n") == 1
