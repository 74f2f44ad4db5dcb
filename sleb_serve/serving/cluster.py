"""The checks of `preflight` on every node of a Ray cluster, before a server starts on them."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

from sleb_serve import __version__
from sleb_serve.compat.vllm_versions import vllm_version
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.gpu import Gpu
from sleb_serve.serving.preflight import FAILED, OK, CheckReport, Finding, check
from sleb_serve.utils.extras import require
from sleb_serve.utils.terminal import one_line

Software = dict[str, str | None]
"""Versions by package; None where it is not installed."""


def check_nodes(
    model: str,
    manifest: Manifest,
    gpu: Gpu | None,
    tp: int,
    revision: str | None = None,
    *,
    full: bool = False,
) -> dict[str, CheckReport]:
    """Run `check` on every node with GPUs, or on every node if none has any.

    Each node uses its own files and its own packages, which must be of this node's versions.

    Returns:
        The report of each node, by address and id.

    Raises:
        SlebError: Ray is not installed, or this machine is no node of a running cluster.
    """
    require("check --cluster", "ray")
    import ray

    try:
        ray.init("auto", logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SlebError(
            f"no running Ray cluster on this machine: {first_line(error)}; join one with "
            "`ray start`, or set RAY_ADDRESS"
        ) from error
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in alive if node["Resources"].get("GPU")] or alive
        arguments = (software(), full, model, manifest, gpu, tp, revision)
        asked = {_name(node): _ask(ray, node, arguments) for node in nodes}
        return {name: _answer(ray, answer) for name, answer in asked.items()}
    finally:
        ray.shutdown()


def software() -> Software:
    """Return the versions that all nodes must share."""
    return {
        "Python": platform.python_version(),
        "sleb-serve": __version__,
        "vLLM": vllm_version(),
    }


def examine(expected: Software, full: bool, model: str, *arguments: Any) -> CheckReport:
    """On a node: check its software and the model."""
    found = software()
    differs = [
        f"{name} is {found[name] or 'not installed'}, on the asking node {version}"
        for name, version in expected.items()
        if found[name] != version
    ]
    same = Finding("software", FAILED, "; ".join(differs))
    if not differs:
        same = replace(same, status=OK, detail="the versions of the asking node")
    try:
        report = check(model, *arguments, full=full)
    except SlebError as error:
        report = CheckReport((Finding("model", FAILED, one_line(str(error))),), {})
    return replace(report, findings=(same, *report.findings))


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _ask(ray: Any, node: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(examine).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
    return task.remote(*arguments)


def _answer(ray: Any, answer: Any) -> CheckReport:
    """Return a node's report; without sleb-serve it has none of its own."""
    try:
        report: CheckReport = ray.get(answer)
    except ray.exceptions.RayError as error:
        detail = f"sleb-serve does not run there: {one_line(str(error).splitlines()[-1])}"
        return CheckReport((Finding("software", FAILED, detail),), {})
    return report
