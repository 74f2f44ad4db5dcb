"""One pruned model over two Ray nodes, by vLLM's Ray executor, against Transformers.

vLLM names no Ray resource for CPUs. The platform plugin made here names one: Ray's logical GPUs, of
which each node gets one, so that no node can hold two ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import THOROUGH, Models
from engines import Case, check_equal, run_jobs
from exports import manifest_for
from running import OPTIONS, WITHIN, Streaming, printed_command

pytest.importorskip("vllm")
pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not THOROUGH, reason="takes minutes; SLEB_TEST_THOROUGH=1 runs it"),
]

CASE = Case("llama", (1, 3))
PLUGIN = {
    "ray_cpu-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ray-cpu\nVersion: 0\n",
    "ray_cpu-0.dist-info/entry_points.txt": "[vllm.platform_plugins]\nray_cpu = ray_cpu:name\n",
    "ray_cpu.py": "def name():\n    return 'ray_cpu_platform.RayCpuPlatform'\n",
    "ray_cpu_platform.py": """
from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id):
        return int(device_id)
""",
}


@dataclass(frozen=True)
class Nodes:
    """Two Ray nodes: the second can be lost."""

    cluster: Any
    second: Any
    environment: dict[str, str]

    def lose_the_second(self) -> None:
        """Kill its raylet; its workers end with it."""
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    for name, text in PLUGIN.items():
        (tmp_path / "plugin" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plugin" / name).write_text(text)
    paths = [str(tmp_path / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # what a node's workers inherit
    cluster, started = Cluster(), []
    try:
        for core in "01":
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", core)
            started.append(cluster.add_node(num_cpus=1, num_gpus=1))
        yield Nodes(cluster, started[1], {**environment, "RAY_ADDRESS": cluster.address})
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_two_nodes_equal_transformers_with_the_blocks_deleted(
    way: str, models: Models, nodes: Nodes, tmp_path: Path
) -> None:
    path = models("llama")
    ranks = {f"{way}_parallel_size": 2, "distributed_executor_backend": "ray"}
    (result,) = run_jobs([CASE.job(path, **ranks)], tmp_path, **nodes.environment)
    assert "error" not in result, result["error"]
    assert len(result["ranks"]) == 2
    check_equal(result, path, CASE)


def test_a_server_ends_when_a_node_is_lost(models: Models, nodes: Nodes, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from sleb_bench.server import Server, free_port
    from sleb_serve.serving.client import Client
    from sleb_serve.serving.command import plugin_environment

    path, manifest, log, port = models("llama"), tmp_path / "m.json", tmp_path / "log", free_port()
    manifest_for(path, CASE.removed).write(manifest)
    ranks = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]
    options = [*OPTIONS, *ranks, "--host", "127.0.0.1", "--port", str(port)]
    plugins = {name: f"{value},ray_cpu" for name, value in plugin_environment().items()}
    command = printed_command(path, manifest, *options)
    server = Server(command, port, log, {**nodes.environment, **plugins})
    try:
        server.wait(200)
        client = Streaming(server.url, Client(server.url).model())
        client.start()
        deadline = time.monotonic() + 60
        while client.tokens < 20:
            assert time.monotonic() < deadline
            assert client.error is None
            time.sleep(0.05)
        nodes.lose_the_second()
        assert server.process.wait(WITHIN) != 0
        client.join(WITHIN)
        assert client.error is not None
    finally:
        server.stop()
    assert "died unexpectedly" in log.read_text(errors="replace")
