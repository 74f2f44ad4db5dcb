"""One pruned model over two Ray nodes, by vLLM's Ray executor, against Transformers.

vLLM names no Ray resource for CPUs. The platform plugin made here names one: Ray's logical GPUs, of
which each node gets one, so that no node can hold two ranks. `make test-ray` installs Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from engines import Case, check_equal, run_jobs
from exports import manifest_for
from running import OPTIONS, WITHIN, printed_command, streams_of
from sleb_serve.cli.main import main

pytest.importorskip("vllm")
pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

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


# vLLM's own pipeline fails on a CPU in eager mode; traced, its kernels need not be compiled.
TRACED = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}


@pytest.mark.parametrize(
    "ranks",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, **TRACED}],
    ids=["TP", "PP"],
)
def test_two_nodes_equal_transformers_with_the_blocks_deleted(
    ranks: dict[str, Any], models: Models, nodes: Nodes, tmp_path: Path
) -> None:
    path = models("llama")
    job = CASE.job(path, distributed_executor_backend="ray", **ranks)
    (result,) = run_jobs([job], tmp_path, VLLM_USE_AOT_COMPILE="0", **nodes.environment)
    assert "error" not in result, result["error"]
    check_equal(result, path, CASE)
    layers = [rank["layers"] for rank in result["ranks"]]
    kept = [0, 2, 4, 5, 6, 7]
    assert layers == ([kept[:3], kept[3:]] if "pipeline_parallel_size" in ranks else [kept, kept])


def test_every_node_is_checked_with_its_own_files(
    models: Models,
    nodes: Nodes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, manifest = models("llama"), tmp_path / "m.json"
    manifest_for(path, CASE.removed).write(manifest)
    monkeypatch.setenv("RAY_ADDRESS", nodes.environment["RAY_ADDRESS"])
    command = ["check", str(path), "-m", str(manifest), "-tp", "2", "--cluster"]

    def answer(code: int) -> dict[str, dict[str, str]]:
        """By node: each check's status."""
        assert main([*command, "--json"]) == code
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] is (code == 0)
        return {
            name: {finding["name"]: finding["status"] for finding in node["findings"]}
            for name, node in report["nodes"].items()
        }

    assert [found["software"] for found in answer(0).values()] == ["ok", "ok"]
    # A third node, where the plugin is disabled.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    nodes.cluster.add_node(num_cpus=1, num_gpus=1)
    monkeypatch.delenv("VLLM_PLUGINS")
    assert sorted(found["vLLM"] for found in answer(1).values()) == ["failed", "ok", "ok"]
    assert main(command) == 1
    assert capsys.readouterr().out.count("ok       model ") == 3


def test_a_server_ends_when_a_node_is_lost(models: Models, nodes: Nodes, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from sleb_bench.server import Server, free_port
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
        (client,) = streams_of(server, 1, within=60)
        nodes.lose_the_second()
        assert server.process.wait(WITHIN) != 0
        client.join(WITHIN)
        assert client.error is not None
    finally:
        server.stop()
    assert "EngineCore encountered a fatal error" in log.read_text(errors="replace")
