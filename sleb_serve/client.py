"""What a running vLLM server answers: a few requests, and errors in one line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleb_serve.errors import SlebError, first_line

_TIMEOUT = 120.0
_MAX_BYTES = 64 << 20


class ServerError(SlebError):
    """A server that cannot be reached, or answers with an error.

    ``status`` is the HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A greedy answer to a prompt.

    Attributes:
        text: what was generated.
        tokens: how many tokens that is.
        prompt_logprobs: of each prompt token but the first, in nats; empty if not asked for.
    """

    text: str
    tokens: int
    prompt_logprobs: tuple[float, ...]


class Client:
    """A vLLM server at `url`, asked for the model that it serves."""

    def __init__(self, url: str, timeout: float = _TIMEOUT) -> None:
        if not url.startswith(("http://", "https://")):
            raise SlebError(f"{url}: give the server's address, as http://localhost:8000")
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout

    def get(self, path: str) -> Any:
        """The JSON at `path`.

        Raises:
            ServerError: no answer, an error, or no JSON.
        """
        return self._ask(urllib.request.Request(f"{self.url}{path}"))

    def model(self) -> str:
        """The name of the model that is served first."""
        try:
            return str(self.get("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.url}/v1/models lists no model; is it a vLLM server?"
            ) from error

    def complete(
        self, model: str, prompt: str | Sequence[int], max_tokens: int, *, score: bool
    ) -> Completion:
        """Answer a prompt greedily; with `score`, also the prompt's own log-probabilities."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if score:
            body["prompt_logprobs"] = 0
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = self._ask(request)
        try:
            choice = answer["choices"][0]
            # Each place holds the prompt's own token first, under its id; the first place nothing.
            scored = tuple(
                float(next(iter(place.values()))["logprob"])
                for place in (choice.get("prompt_logprobs") or ())
                if place
            )
            return Completion(choice["text"], int(answer["usage"]["completion_tokens"]), scored)
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            raise ServerError(
                f"{self.url}/v1/completions: an answer that is not vLLM's ({first_line(error)})"
            ) from error

    def _ask(self, request: urllib.request.Request) -> Any:
        where = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                return json.loads(reply.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            told = " ".join(error.read(400).decode(errors="replace").split())
            raise ServerError(f"{where}: HTTP {error.code}: {told}", error.code) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            why = first_line(reason) if isinstance(reason, Exception) else str(reason)
            raise ServerError(f"{where}: no answer: {why}; is the server up?") from error
