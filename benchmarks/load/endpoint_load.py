"""Whether 1,000 requests at once to `GET /sleb/manifest` slow a stream, on one server by turns.

Usage: endpoint_load.py URL OUTPUT [--rounds N]. The server must run and serve a pruned model.
OUTPUT gets a line of JSON a stream: with how many requests beside it, and how long it took. The
streams take turns, without and with the requests, and the ratio is taken round by round. The client
shares the machine with the server, so each request is bytes written to a connection of its own,
and costs the client little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from sleb_bench.ratios import paired_ratio
from sleb_serve.protocol import MANIFEST_PATH

REQUESTS = 1000
TOKENS = 96


@dataclass(frozen=True)
class Stream:
    """A greedy completion as it came, and the seconds from its first token on.

    A busy server sends several tokens in one chunk.
    """

    text: str
    tokens: int
    chunks: int
    seconds: float


Answer = tuple[int, bytes]
"""A status, and what was read."""


async def stream_and_ask(
    url: str, model: str, path: str, requests: int, tokens: int = TOKENS
) -> tuple[Stream, list[Answer]]:
    """One stream, and once its first token is there, so many requests at once to `path`."""
    body = {"model": model, "prompt": "Once", "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    asked: list[asyncio.Task[Answer]] = []
    async with aiohttp.ClientSession(url) as session:
        start, count = 0.0, 0
        async with session.post("/v1/completions", json=body) as reply:
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    count = chunk["usage"]["completion_tokens"]
                    continue
                pieces.append(chunk["choices"][0]["text"])
                if not start:
                    start = time.perf_counter()
                    asked = [asyncio.create_task(_ask(url, path)) for _ in range(requests)]
        seconds = time.perf_counter() - start
        stream = Stream("".join(pieces), count, len(pieces), seconds)
        return stream, list(await asyncio.gather(*asked))


async def _ask(url: str, path: str) -> Answer:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


async def _measure(url: str, output: Path, rounds: int) -> None:
    async with aiohttp.ClientSession(url) as session, session.get("/v1/models") as reply:
        served = (await reply.json())["data"][0]
    tokens = int(served["max_model_len"]) - 16
    lines = []
    # The first round warms both up, and does not count.
    for number in range(rounds + 1):
        for requests in (0, REQUESTS) if number % 2 else (REQUESTS, 0):
            stream, answers = await stream_and_ask(
                url, served["id"], MANIFEST_PATH, requests, tokens
            )
            if {status for status, _ in answers} - {200}:
                raise SystemExit("a request was refused")
            if number:
                record = {"round": number, "requests": requests, "chunks": stream.chunks}
                lines.append({**record, "seconds": round(stream.seconds, 4)})
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{os.cpu_count()} cores; streams of {tokens} tokens; {summary(lines)}")


def summary(lines: list[dict[str, float]]) -> str:
    """The slowdown that the records show."""
    by_requests = {
        count: [line["seconds"] for line in lines if line["requests"] == count]
        for count in (0, REQUESTS)
    }
    alone, beside = by_requests[0], by_requests[REQUESTS]
    found = paired_ratio([[b / a] for a, b in zip(alone, beside, strict=True)], apart=True)
    low, high = found.interval or (float("nan"), float("nan"))
    return (
        f"{len(alone)} rounds: "
        f"{sum(alone) / len(alone):.2f} s alone, {sum(beside) / len(beside):.2f} s with "
        f"{REQUESTS} requests at once, {100 * (found.mean - 1):+.1f} % "
        f"({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %)"
    )


def main() -> None:
    """Measure a server that runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    asyncio.run(_measure(options.url, options.output, options.rounds))


if __name__ == "__main__":
    main()
