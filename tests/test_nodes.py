"""One pruned model over two machines: vLLM's own ranks, node by node, against Transformers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from engines import Case, check_equal, run_jobs
from exports import manifest_for
from forking import end_fork, fork_engines, start_fork
from running import OPTIONS, WITHIN, ForkedServer, printed_command, streams_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(120)

CASE = Case("llama", (1, 3))
HOST = {"VLLM_HOST_IP": "127.0.0.1"}


def run_node(arguments: list[str]) -> None:
    """For a fork: a machine without an API server, as `vllm serve --headless` runs it."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    fork_engines()
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    parsed.api_server_count = 0  # as the command sets it
    run_headless(parsed)


@contextmanager
def second_node(command: list[str], log: Path) -> Iterator[Any]:
    """The second of two machines: the first one's command with another rank, and no API."""
    arguments = [*command[command.index("--model") :], "--node-rank", "1", "--headless"]
    environment = {**HOST, "VLLM_CPU_OMP_THREADS_BIND": "1" if (os.cpu_count() or 1) > 1 else "0"}
    child = start_fork(run_node, log, arguments, **environment)
    try:
        yield child
    finally:
        end_fork(child)


def nodes(port: int) -> list[str]:
    """Options of both machines."""
    group = ["--distributed-executor-backend", "mp", "--master-addr", "127.0.0.1"]
    return ["--tensor-parallel-size", "2", "--nnodes", "2", *group, "--master-port", str(port)]


@pytest.fixture
def manifest(models: Models, tmp_path: Path) -> Path:
    path = tmp_path / "m.json"
    manifest_for(models("llama"), CASE.removed).write(path)
    return path


@pytest.mark.slow
def test_two_machines_equal_transformers_with_the_blocks_deleted(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    """By tensor parallelism; vLLM 0.32 loses requests of two stages, of the dense model too."""
    from sleb_bench.server import free_port

    path, port = models("llama"), free_port()
    # Each machine makes its own configuration, and an engine's default is not a server's.
    options = [*OPTIONS, "--no-async-scheduling", *nodes(port)]
    command = printed_command(path, manifest, *options)
    group = {"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": port}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **group}
    job = CASE.job(path, max_model_len=256, async_scheduling=False, **ranks)
    with second_node(command, tmp_path / "node.log"):
        (result,) = run_jobs([job], tmp_path, **HOST, VLLM_CPU_OMP_THREADS_BIND="0")
    assert "error" not in result, result["error"]
    assert len(result["ranks"]) == 2
    check_equal(result, path, CASE)
    # Each machine has its own files, and compares them.
    for log in ("output.log", "node.log"):
        said = (tmp_path / log).read_text(errors="replace")
        assert said.count("Weights compared with the manifest") == 1, log


@pytest.mark.slow
def test_a_server_ends_when_its_other_machine_is_lost(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("openai")
    from sleb_bench.server import free_port

    port, group = free_port(), nodes(free_port())
    options = [*OPTIONS, *group, "--host", "127.0.0.1", "--port", str(port)]
    command = printed_command(models("llama"), manifest, *options)
    environment = {**HOST, "VLLM_CPU_OMP_THREADS_BIND": "0"}
    with second_node(command, tmp_path / "node.log") as node:
        server = ForkedServer(command, port, tmp_path / "log", environment)
        try:
            server.wait(300)
            (client,) = streams_of(server, 1)
            lost = psutil.Process(node.pid)
            for process in (*lost.children(recursive=True), lost):
                process.send_signal(signal.SIGKILL)
            begin = time.monotonic()
            server.process.wait(WITHIN)
            assert time.monotonic() - begin < WITHIN
            client.join(WITHIN)
            assert client.error is not None
        finally:
            server.stop()
    assert (tmp_path / "log").stat().st_size
