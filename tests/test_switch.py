"""Another number of blocks without a gap: two servers behind nginx, and deploy/nginx's script."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import oracle
from conftest import ROOT, THOROUGH, Models
from engines import NEW_TOKENS, PROMPTS, greedy_equal
from exports import exported, manifest_for
from running import LOCAL, OPTIONS, ForkedServer, printed_command
from sleb_bench.server import free_port
from sleb_serve.checkpoint.hub import open_checkpoint

NGINX = shutil.which("nginx")
NAME = "llama"
CLIENTS = 3
REMOVED = (2, 5, 3)
"""The manifest's list, of which two or three blocks are removed."""
SMOLLM2 = (5, 25, 17, 16, 18, 12)
LONG = "takes a minute; SLEB_TEST_THOROUGH=1 runs it"

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@contextmanager
def nginx(folder: Path, port: int, server: int) -> Iterator[str]:
    """The shipped configuration on other ports; its address."""
    shutil.copytree(ROOT / "deploy" / "nginx", folder)
    for name, there, here in (
        ("nginx.conf", "listen 8000;", f"listen 127.0.0.1:{port};"),
        ("upstream.conf", ":8001;", f":{server};"),
    ):
        text = (folder / name).read_text()
        assert there in text
        (folder / name).write_text(text.replace(there, here))
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"]
    subprocess.run([*command, "-t", "-q"], check=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "-g", "daemon off;"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not listens(port):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_configuration_runs_without_a_server(tmp_path: Path) -> None:
    with (
        nginx(tmp_path / "nginx", free_port(), free_port()) as url,
        pytest.raises(urllib.error.HTTPError, match="502"),
    ):
        urllib.request.urlopen(f"{url}/health", timeout=10)


@dataclass(frozen=True)
class Answer:
    start: float
    end: float
    prompt: int
    streamed: bool
    tokens: tuple[int, ...]


@dataclass
class Load:
    """Clients that ask without a break, whole and streamed by turns, and never a second time."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def wait(self, count: int) -> None:
        """Until so many more requests have ended."""
        wanted = len(self.answers) + len(self.failures) + count
        deadline = time.monotonic() + 60
        while len(self.answers) + len(self.failures) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _ask(self, number: int) -> None:
        import openai

        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        while not self._done.is_set():
            number += 1
            streamed, prompt = bool(number % 2), number // 2 % len(PROMPTS)
            start = time.monotonic()
            try:
                tokens = complete(client, PROMPTS[prompt], streamed)
                assert len(tokens) == NEW_TOKENS
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            else:
                answer = Answer(start, time.monotonic(), prompt, streamed, tuple(tokens))
                self.answers.append(answer)


def complete(client: Any, prompt: list[int], streamed: bool) -> list[int]:
    reply = client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=streamed,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    chunks = reply if streamed else [reply]
    return [token for chunk in chunks for c in chunk.choices for token in c.token_ids or []]


def switch(folder: Path, port: int, manifest: Path, blocks: int) -> tuple[float, float]:
    """Run the shipped script; when it began and ended."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    start = time.monotonic()
    done = subprocess.run(
        [folder / "switch.sh", f"127.0.0.1:{port}", "-m", manifest, "--blocks", str(blocks)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("no request is left on the server before\n")
    return start, time.monotonic()


def check_reload_refused(url: str, shorter: Path) -> None:
    """Ask a running server, in vLLM's development mode, to read a model of another depth."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(shorter)}}
    request = urllib.request.Request(
        f"{url}/collective_rpc", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="500"):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "removed", "fewer", "more"),
    [
        ("llama", REMOVED, 2, 3),
        pytest.param("smollm2", SMOLLM2, 4, 6, marks=pytest.mark.skipif(not THOROUGH, reason=LONG)),
    ],
)
def test_some_blocks_more_of_them_and_some_again_without_a_failed_request(
    models: Models,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    removed: Sequence[int],
    fewer: int,
    more: int,
) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    path = request.getfixturevalue("smollm2") if name == "smollm2" else models(name)
    manifest, folder = tmp_path / "m.json", tmp_path / "nginx"
    manifest_for(path, removed).write(manifest)
    cores = sorted(os.sched_getaffinity(0))
    ports = [free_port() for _ in range(4)]

    def start(stack: ExitStack, number: int, blocks: int) -> ForkedServer:
        port = ports[number]
        options = ["--blocks", str(blocks), "--served-model-name", NAME, *OPTIONS, *LOCAL]
        bind = {
            "VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)]),
            "VLLM_SERVER_DEV_MODE": "1",
        }
        command = printed_command(path, manifest, *options, str(port))
        server = ForkedServer(command, port, tmp_path / f"{number}.log", bind)
        stack.callback(server.stop)
        return server

    with ExitStack() as stack:
        server = start(stack, 0, fewer)
        server.wait(300)
        url = stack.enter_context(nginx(folder, ports[3], ports[0]))
        times = []
        with Load(url) as load:
            load.wait(8)
            check_reload_refused(server.url, exported(path, removed, tmp_path / "shorter"))
            count = open_checkpoint(str(path)).num_blocks
            found = f"number of decoder blocks expected {count}, found {count - len(removed)}"
            assert found in server.log.read_text()
            load.wait(4)
            for number, blocks in ((1, more), (2, fewer)):
                following = start(stack, number, blocks)
                times.append(switch(folder, ports[number], manifest, blocks))
                server.stop()
                server = following
                load.wait(12)
    assert not load.failures
    of = says(path, {blocks: removed[:blocks] for blocks in (fewer, more)})
    check_depths(load.answers, times, (fewer, more, fewer), of)


def says(path: Path, depths: Mapping[int, Sequence[int]]) -> Callable[[Answer], set[int]]:
    """Of an answer, the numbers of removed blocks of which it is the right one."""
    exact = {blocks: oracle.pruned(path, sorted(removed)) for blocks, removed in depths.items()}
    known: dict[tuple[int, tuple[int, ...]], set[int]] = {}

    def of(answer: Answer) -> set[int]:
        key = (answer.prompt, answer.tokens)
        if key not in known:
            result = {"tokens": [list(answer.tokens)]}
            prompts = [PROMPTS[answer.prompt]]
            known[key] = {b for b, m in exact.items() if greedy_equal(result, m, prompts)}
        return known[key]

    return of


def check_depths(
    answers: list[Answer],
    times: list[tuple[float, float]],
    served: tuple[int, int, int],
    depths: Callable[[Answer], set[int]],
) -> None:
    """Before, between and after the switches one depth answers; meanwhile, one of the two."""
    (first, then), (second, last) = times
    periods = ((0.0, first), (then, second), (last, float("inf")))
    for (begin, end), blocks in zip(periods, served, strict=True):
        within = [a for a in answers if begin <= a.start and a.end <= end]
        assert {a.streamed for a in within} == {True, False}
        assert {a.prompt for a in within} == set(range(len(PROMPTS)))
        assert all(depths(a) == {blocks} for a in within)
    assert all(len(depths(a)) == 1 for a in answers)
    # Requests went on while the script waited for the next server.
    assert all(any(b < a.end < e for a in answers) for b, e in times)
