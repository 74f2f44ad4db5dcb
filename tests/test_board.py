"""The Grafana board against a real Prometheus that scrapes a dense and a pruned server."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import ROOT, Models
from running import ForkedServer, printed_command

sys.path.insert(0, str(ROOT / "deploy"))
from plot_board import ask, panels

from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.serving.canary import canary, read_prompts
from sleb_serve.serving.client import Client

pytestmark = pytest.mark.slow

PROMETHEUS = shutil.which("prometheus")
SECONDS = float(os.environ.get("SLEB_TEST_BOARD_SECONDS", "15"))
"""How long both servers are scraped under load."""


def prometheus(folder: Path, watched: list[str], stack: ExitStack) -> str:
    """Start Prometheus on servers; its address."""
    from sleb_bench.server import free_port

    assert PROMETHEUS is not None
    targets = ", ".join(url.removeprefix("http://") for url in watched)
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        f"  - {{job_name: vllm, static_configs: [{{targets: [{targets}]}}]}}\n"
    )
    port = free_port()
    options = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = stack.enter_context((folder / "prometheus.log").open("wb"))
    process = subprocess.Popen([PROMETHEUS, *options], stdout=subprocess.DEVNULL, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def watched(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Client, Client]]:
    """Prometheus, and the two servers it watches, after some load."""
    pytest.importorskip("vllm")
    if PROMETHEUS is None:
        pytest.skip("Prometheus is not installed")
    from sleb_bench.server import free_port
    from sleb_serve.serving.command import server_command

    folder, path = tmp_path_factory.mktemp("board"), models("llama")
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(3), Removal(1)))
    manifest.write(folder / "m.json")
    common = ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32"]
    common += ["--host", "127.0.0.1", "--port"]
    with ExitStack() as stack:
        servers = []
        for name in ("dense", "pruned"):
            port = free_port()
            command = (
                printed_command(path, folder / "m.json", *common, str(port))
                if name == "pruned"
                else server_command(str(path), ["--served-model-name", "llama", *common, str(port)])
            )
            servers.append(ForkedServer(command, port, folder / f"{name}.log"))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait(300)
        url = prometheus(folder, [server.url for server in servers], stack)
        clients = [Client(server.url) for server in servers]
        done = threading.Event()

        def load() -> None:
            # By turns: two engines that compute at once on the same cores starve each other.
            while not done.is_set():
                for client in clients:
                    client.complete(client.model(), [5, 6, 7, 8], 16, score=False)

        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(SECONDS)
        yield url, clients[0], clients[1]
        done.set()
        thread.join()


def test_every_query_of_the_board_returns_data(watched: tuple[str, Client, Client]) -> None:
    prometheus = watched[0]
    names = {client.model() for client in watched[1:]}
    for title, queries in panels("10s"):
        for query, _ in queries:
            found = ask(prometheus, "query", query=query)
            assert found, f"{title}: {query}"
            assert all(math.isfinite(float(series["value"][1])) for series in found), title
            if "sleb_serve_" not in query and "sleb[0-9]" not in query:
                assert {series["metric"]["model_name"] for series in found} == names, title


def test_a_picture_is_drawn_of_it(watched: tuple[str, Client, Client], tmp_path: Path) -> None:
    picture = Path(os.environ.get("SLEB_TEST_BOARD_PICTURE", tmp_path / "board.png"))
    script = ROOT / "deploy" / "plot_board.py"
    subprocess.run(
        [sys.executable, str(script), watched[0], str(picture), "--seconds", "60"], check=True
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_canary_sees_real_drift(watched: tuple[str, Client, Client]) -> None:
    _, dense, pruned = watched
    prompts = [prompt[:100] for prompt in read_prompts(None, 4)]
    same = canary(dense, dense, prompts, 8, concurrency=1)
    assert (same.loss_drift, same.logprob_drift, same.same_share) == (0, 0, 1)
    drift = canary(dense, pruned, prompts, 8, concurrency=1)
    assert drift.requests == 4
    assert drift.logprob_drift > 0.05
