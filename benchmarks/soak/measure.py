"""Test a pruned server under mixed load for some minutes: failures, memory, stable answers.

Usage: measure.py MODEL M.json OUTPUT.json [--minutes 20] [--concurrency 16] [--dtype float32] (for
a CPU without native bfloat16). Sixteen clients send short and long prompts, streamed and complete,
abort streams, and send malformed requests. No well-formed request may fail, resident memory after
the first fifth must not grow by 5 %, and greedy answers must be the same at the end as at the
start.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from sleb_bench.machine import machine
from sleb_bench.server import Server, free_port
from sleb_serve.utils.atomic_io import write_atomically

PROMPTS = ([1], [5, 6, 7], list(range(100, 164)), list(range(1000, 1800)))
MALFORMED: tuple[tuple[bytes, str], ...] = (
    (b"{", "not JSON"),
    (b"[]", "not an object"),
    (b'{"model": "none", "prompt": "x"}', "another model"),
    (b'{"model": "MODEL", "prompt": [1], "max_tokens": -1}', "negative tokens"),
    (b'{"model": "MODEL", "prompt": [99999999]}', "no such token"),
    (b'{"model": "MODEL", "prompt": [1], "temperature": "hot"}', "a word for a number"),
)
_SAMPLE_SECONDS = 5.0
_GROWTH = 0.05


class Load:
    """Clients that run until stopped, and their results."""

    def __init__(self, url: str, model: str, concurrency: int) -> None:
        self._url, self._model = f"{url}/v1/completions", model
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(number,)) for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every client finish its request."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        source = random.Random(number)
        with httpx.Client(timeout=300) as client:
            while not self._done.is_set():
                kind = source.choice(("whole", "streamed", "broken off", "malformed", "whole"))
                try:
                    self._send(client, kind, source)
                except Exception as error:
                    with self._lock:
                        self.failures.append(f"{kind}: {type(error).__name__}: {error}"[:200])
                with self._lock:
                    self.counts[kind] += 1

    def _send(self, client: httpx.Client, kind: str, source: random.Random) -> None:
        if kind == "malformed":
            data, _ = source.choice(MALFORMED)
            reply = client.post(self._url, content=data.replace(b"MODEL", self._model.encode()))
            if not 400 <= reply.status_code < 500:
                raise ValueError(f"HTTP {reply.status_code} for {data!r}")
            return
        length = source.choice((1, 8, 32))
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": source.choice(PROMPTS),
            "max_tokens": length,
            "ignore_eos": True,
        }
        if kind == "whole":
            reply = client.post(self._url, json=body)
            reply.raise_for_status()
            found = reply.json()["usage"]["completion_tokens"]
            if found != length:
                raise ValueError(f"{found} tokens, not {length}")
            return
        with client.stream("POST", self._url, json={**body, "stream": True}) as stream:
            stream.raise_for_status()
            last = ""
            for line in stream.iter_lines():
                if line and kind == "broken off":
                    return  # leaving closes the connection
                last = line or last
            if last != "data: [DONE]":
                raise ValueError(f"the stream ended with {last!r}")


def answers(url: str, model: str) -> list[str]:
    """Return greedy answers to all prompts, one after another."""
    found = []
    for prompt in PROMPTS:
        body = {"model": model, "prompt": prompt, "max_tokens": 32, "temperature": 0}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
        reply.raise_for_status()
        found.append(str(reply.json()["choices"][0]["text"]))
    return found


def resident(server: Server) -> int:
    """Return the resident bytes of all server processes, counting shared ones once."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().pss for member in family)


def main() -> int:
    """Run the test; return 0 if all three conditions hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    port = free_port()
    command = [
        *(sys.executable, "-m", "sleb_serve.cli", "serve", options.model),
        *("-m", options.manifest, "--served-model-name", "m", "--enforce-eager"),
        *("--dtype", options.dtype),
        *("--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(port)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(command, port, Path(folder) / "log")
        try:
            server.wait()
            before = answers(server.url, "m")
            load = Load(server.url, "m", options.concurrency)
            begin = time.monotonic()
            memory = []
            while time.monotonic() < begin + 60 * options.minutes:
                time.sleep(_SAMPLE_SECONDS)
                memory.append((round(time.monotonic() - begin, 1), resident(server)))
            load.stop()
            after = answers(server.url, "m")
        finally:
            server.stop()
    settled = memory[len(memory) // 5 :]
    third = max(1, len(settled) // 3)
    first, last = (
        sum(size for _, size in part) / len(part) for part in (settled[:third], settled[-third:])
    )
    found = {
        "command": command,
        "minutes": options.minutes,
        "concurrency": options.concurrency,
        "requests": dict(load.counts),
        "failures": load.failures,
        "memory": memory,
        "memory_growth": last / first - 1,
        "answers_equal": before == after,
        "answers": before,
        "machine": machine(),
    }
    write_atomically(options.output, (json.dumps(found, indent=1) + "\n").encode())
    shown = {k: found[k] for k in ("requests", "failures", "memory_growth", "answers_equal")}
    print(json.dumps(shown, indent=1))
    return int(bool(load.failures) or found["memory_growth"] >= _GROWTH or before != after)


if __name__ == "__main__":
    sys.exit(main())
