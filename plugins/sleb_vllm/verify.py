"""Checks of every rank's layers against the manifest and the other ranks."""

from __future__ import annotations

from typing import Any

from sleb_serve.checkpoint.decoder import TOWERS
from sleb_serve.cut.layers import decoder_of as decoder_config_of
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.protocol import FORMAT

REPORT = "sleb_report"
"""Name of the workers' report method; see `rank_report`."""


def check_config(model_config: Any, pruning: Pruning) -> None:
    """Refuse a config that differs from the manifest's cut of the dense one, and name the key.

    Raises:
        SlebError: something else changed the config's layer entries.
    """
    from vllm.transformers_utils.config import HFConfigParser

    from sleb_vllm.config_parser import shorten

    # Read again, because the user's overrides are applied after the parser.
    _, config = HFConfigParser().parse(
        model_config.model, model_config.trust_remote_code, revision=model_config.revision
    )
    changed = shorten(config, pruning)
    expected = decoder_config_of(config).to_dict()
    found = decoder_config_of(model_config.hf_config).to_dict()
    for key in sorted(changed):
        if expected.get(key) != found.get(key):
            raise SlebError(
                f"the config says {key} = {found.get(key)!r} where the manifest leaves "
                f"{expected.get(key)!r}; do not override it, and use --config-format {FORMAT}, as "
                f"`sleb-serve serve --dry-run` prints"
            )


def decoder_of(model: Any, vllm_config: Any, pruning: Pruning) -> tuple[str, Any]:
    """Return the name and the list of the decoder layers in vLLM's model.

    Raises:
        SlebError: its number of layers differs from the manifest's.
    """
    from torch import nn

    count = len(pruning.cut.kept)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    states = vllm_config.compilation_config.static_forward_context
    # Layers with a per-request state belong to the decoder, not to a tower. Encoders have none, and
    # some models name their states differently from their modules.
    used = {name for name in lists if any(key.startswith(f"{name}.") for key in states)}
    used = used or {name for name in lists if not TOWERS.intersection(name.split("."))}
    used = used or set(lists)
    outer = [name for name in used if not any(name.startswith(f"{o}.") for o in used)]
    if len(outer) != 1:
        found = ", ".join(sorted(outer)) or "none"
        raise SlebError(
            f"{type(model).__name__} has {len(outer)} lists of {count} decoder layers ({found}) "
            f"where the manifest leaves one; this vLLM cannot serve it pruned"
        )
    return outer[0], lists[outer[0]]


def rank_report(worker: Any) -> dict[str, Any] | None:
    """Describe this rank's model in plain values; None if it is not pruned."""
    built = getattr(worker.get_model(), "sleb", None)
    return None if built is None else built.report(worker.rank)


def install_report() -> None:
    """Let the first process request `rank_report` from any worker of this process."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, REPORT, rank_report)


def check_same_digest(pruning: Pruning) -> None:
    """Stop if ranks have different manifests. Every rank must call it.

    Raises:
        SlebError: names the digests.
    """
    import torch
    from vllm.distributed import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return
    digests: list[str] = [""] * group.world_size
    torch.distributed.all_gather_object(digests, pruning.digest, group=group.cpu_group)
    if len(set(digests)) > 1:
        raise SlebError(
            f"the ranks were given different manifests: {', '.join(d[:8] for d in digests)}; start "
            f"all of them with the same arguments"
        )
