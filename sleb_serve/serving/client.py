"""A small client for running vLLM servers with one-line errors.

Requests use no proxy and follow no redirects. For any answer, a request ends in limited time and
memory, with a typed result or a `ServerError`.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sleb_serve.errors import SlebError, first_line
from sleb_serve.serving.address import Address, parse_address, without_credentials
from sleb_serve.utils import strict_json

TIMEOUT = 120.0
"""Maximum seconds from the name lookup to the answer's last byte."""
MAX_BYTES = 8 << 20
"""Enough for a text of some thousand tokens with log-probabilities."""
_CHUNK = 64 << 10
_MAX_SAID = 300
_MAX_LOGPROB = 1e6
"""vLLM writes -9999 for minus infinity."""
_MAX_TOKENS = 1 << 31
_OK = range(200, 300)
_REDIRECTS = range(300, 400)

T = TypeVar("T")


class ServerError(SlebError):
    """The server cannot be reached or answers with an error.

    ``status`` is the HTTP status, or None without an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(_printable(message))
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A greedy answer to a prompt.

    Attributes:
        text: the generated text.
        tokens: its number of tokens.
        prompt_logprobs: of each prompt token except the first, in nats; empty if not requested.
    """

    text: str
    tokens: int
    prompt_logprobs: tuple[float, ...]


class Client:
    """A vLLM server at `url`, asked for the model that it serves, with `key` if it wants one."""

    def __init__(self, url: str, timeout: float | None = None, key: str | None = None) -> None:
        self._address = parse_address(url)
        self.url, self._timeout, self._key = self._address.url, timeout, key

    def get(self, path: str, read: Callable[[object], T]) -> T:
        """Get the JSON at `path` and parse it with `read`.

        Raises:
            ServerError: there is no answer, an error, no JSON, or `read` raised a `SlebError`.
        """
        return self._ask("GET", path, None, read)

    def model(self) -> str:
        """Return the name of the first served model."""
        return self.get("/v1/models", _first_model)

    def complete(
        self, model: str, prompt: str | Sequence[int], max_tokens: int, *, score: bool
    ) -> Completion:
        """Complete a prompt greedily; with `score`, also get the prompt's log-probabilities."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if score:
            body["prompt_logprobs"] = 0
        return self._ask("POST", "/v1/completions", json.dumps(body).encode(), _completion)

    def _ask(self, method: str, path: str, body: bytes | None, read: Callable[[object], T]) -> T:
        where = f"{self.url}{path}"
        timeout = TIMEOUT if self._timeout is None else self._timeout
        try:
            deadline = time.monotonic() + timeout
            data = _exchange(self._address, method, path, body, deadline, self._key)
        except TimeoutError as error:
            raise ServerError(
                f"{where}: no answer within {timeout:g} seconds; is the server up?"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(
                f"{where}: no answer: {first_line(error)}; is the server up?"
            ) from error
        try:
            return read(strict_json.load(data))
        except SlebError as error:
            raise ServerError(
                f"{where}: an answer that cannot be read: {strict_json.without_advice(error)}; is "
                f"it a vLLM server?"
            ) from error


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


class _Timed(io.RawIOBase):
    """Reads from a socket until a deadline; replaces the socket in `HTTPResponse`."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _exchange(
    address: Address,
    method: str,
    path: str,
    body: bytes | None,
    deadline: float,
    key: str | None,
) -> bytes:
    """Return the body of a response; raise an `OSError` or `HTTPException` without one."""
    request = http.client.HTTPConnection(address.host, address.port)
    with _connect(address, deadline) as connection:
        connection.settimeout(_left(deadline))
        request.sock = connection
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request.request(method, address.path + path, body, headers)
        # The declared type is a socket, but only makefile is used.
        timed: Any = _Timed(connection, deadline)
        with http.client.HTTPResponse(timed, method=method) as response:
            response.begin()
            return _body(response, f"{address.url}{path}")


def _connect(address: Address, deadline: float) -> socket.socket:
    """Connect to the first of the host's addresses that accepts."""
    failed: OSError = OSError("the host has no address")
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for i, (family, kind, protocol, _, where) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            # Leave time for other addresses if one never answers.
            connection.settimeout(_left(deadline) / (len(found) - i))
            connection.connect(where)
            if address.secure:
                context = ssl.create_default_context()
                return context.wrap_socket(connection, server_hostname=address.host)
        except OSError as error:
            connection.close()
            failed = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failed


def _body(response: http.client.HTTPResponse, where: str) -> bytes:
    status = response.status
    if status in _REDIRECTS:
        to = strict_json.short(without_credentials(response.getheader("Location") or ""))
        raise ServerError(
            f"{where}: HTTP {status}: it redirects to {to}; give the address that answers itself",
            status,
        )
    if status not in _OK:
        told = " ".join(_start(response).decode(errors="replace").split())
        told = told[:_MAX_SAID] or "no reason given, see the server's log"
        raise ServerError(f"{where}: HTTP {status}: {told}", status)
    encoding = response.getheader("Content-Encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise ServerError(
            f"{where}: the answer is compressed ({encoding[:20]}), which was not requested; use "
            "vLLM's own address, not a proxy's",
            status,
        )
    data = bytearray()
    while piece := response.read(_CHUNK):
        data += piece
        if len(data) > MAX_BYTES:
            raise ServerError(
                f"{where}: the answer is longer than {MAX_BYTES >> 20} MiB; is it a vLLM server?",
                status,
            )
    if response.length:
        raise ServerError(
            f"{where}: the answer is cut short, {response.length} bytes are missing; is the "
            f"server going down?",
            status,
        )
    return bytes(data)


def _start(response: http.client.HTTPResponse) -> bytes:
    """Return the start of an error's text; empty if it is not available."""
    try:
        return response.read(4 * _MAX_SAID)
    except (OSError, ValueError, http.client.HTTPException):
        return b""


def _first_model(answer: object) -> str:
    models = strict_json.list_(strict_json.any_object(answer, "the answer").get("data"), "data")
    if not models:
        raise SlebError("data names no model")
    return strict_json.line(strict_json.any_object(models[0], "data[0]").get("id"), "data[0].id")


def _completion(answer: object) -> Completion:
    fields = strict_json.any_object(answer, "the answer")
    choices = strict_json.list_(fields.get("choices"), "choices")
    if not choices:
        raise SlebError("choices is empty")
    choice = strict_json.any_object(choices[0], "choices[0]")
    text = choice.get("text")
    if not isinstance(text, str):
        raise SlebError(f"choices[0].text must be a text, found {strict_json.short(text)}")
    usage = strict_json.any_object(fields.get("usage"), "usage")
    tokens = strict_json.integer(
        usage.get("completion_tokens"), "usage.completion_tokens", 0, _MAX_TOKENS
    )
    places = choice.get("prompt_logprobs")
    scored = [] if places is None else strict_json.list_(places, "prompt_logprobs")
    # The first token has no predecessor.
    rest = scored[1:] if scored and scored[0] is None else scored
    return Completion(text, tokens, tuple(map(_logprob, rest)))


def _logprob(place: object) -> float:
    """Return the log-probability of the prompt's own token, which comes first."""
    tokens = strict_json.any_object(place, "a place of prompt_logprobs")
    if not tokens:
        raise SlebError("a place of prompt_logprobs is empty")
    token = strict_json.any_object(next(iter(tokens.values())), "a token of prompt_logprobs")
    value = strict_json.number(token.get("logprob"), "a logprob of prompt_logprobs")
    if abs(value) > _MAX_LOGPROB:
        raise SlebError(f"a logprob of prompt_logprobs is out of range: {value:g}")
    return value
