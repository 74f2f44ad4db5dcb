"""What every rank built and loaded, held against the manifest and against each other."""

from __future__ import annotations

from typing import Any

from sleb_serve.checkpoint.decoder import TOWERS
from sleb_serve.cut.layers import decoder_of as decoder_config_of
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.protocol import FORMAT

REPORT = "sleb_report"
"""The workers' method that tells of a rank; see `rank_report`."""


def check_config(model_config: Any, pruning: Pruning) -> None:
    """Refuse a config that is not the manifest's cut of the dense one, by the key that differs.

    Raises:
        SlebError: something else changed what the config says of the layers.
    """
    from vllm.transformers_utils.config import HFConfigParser

    from sleb_vllm.config_parser import shorten

    # Read once more: overrides of the user's own come after the parser.
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
    """The name and the list of the decoder's layers in a model that vLLM built.

    Raises:
        SlebError: it has another number of layers than the manifest leaves.
    """
    from torch import nn

    count = len(pruning.cut.kept)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    states = vllm_config.compilation_config.static_forward_context
    # The layers that keep a state for each request are the decoder's, not a tower's. Encoders keep
    # none, and some models name their states otherwise than their modules.
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
    """What this rank's model is, in plain values; None where it is not a pruned one."""
    built = getattr(worker.get_model(), "sleb", None)
    return None if built is None else built.report(worker.rank)


def install_report() -> None:
    """Let the first process ask any worker of this process for its `rank_report`."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, REPORT, rank_report)


def check_same_digest(pruning: Pruning) -> None:
    """Refuse to go on where ranks were given different manifests. Every rank must call it.

    Raises:
        SlebError: naming the digests.
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
