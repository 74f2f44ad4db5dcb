"""What every rank built and loaded, held against the manifest and against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.pruning import Pruning

REPORT = "sleb_report"
"""The workers' method that tells of a rank; see `rank_report`."""


def rank_report(worker: Any) -> dict[str, Any] | None:
    """What this rank's model is, in plain values; None where it is not a pruned one."""
    built = getattr(worker.get_model(), "sleb", None)
    if built is None:
        return None
    return {
        "rank": worker.rank,
        "digest": built.pruning.digest,
        "layers": list(built.layers),
        "parameters": built.parameters,
        "weights_read_bytes": built.weights_read_bytes,
        "weights_skipped_bytes": built.weights_skipped_bytes,
    }


def install_report() -> None:
    """Let the first process ask any worker of this process for its `rank_report`."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, REPORT, rank_report)


def check_ranks(pruning: Pruning, reports: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse ranks that do not together hold exactly what the manifest leaves.

    Raises:
        SlebError: naming the rank and what it holds.
    """
    held: set[int] = set()
    for number, report in enumerate(reports):
        if report is None:
            raise SlebError(f"rank {number} serves no pruned model; restart the server")
        if report["digest"] != pruning.digest:
            raise SlebError(
                f"rank {report['rank']} holds manifest {report['digest'][:8]}, the server "
                f"{pruning.digest[:8]}; restart it with one manifest"
            )
        held |= set(report["layers"])
    kept = set(range(pruning.num_blocks)) - set(pruning.removed)
    if held != kept:
        raise SlebError(
            f"the ranks hold decoder layers {sorted(held)} where the manifest leaves "
            f"{sorted(kept)}; this vLLM cannot serve the model pruned"
        )


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


class Watched:
    """Passes a checkpoint's tensors on and remembers which blocks they belong to."""

    def __init__(self, checkpoint: Checkpoint, pruning: Pruning) -> None:
        self._checkpoint, self._pruning = checkpoint, pruning
        self._seen: set[int] = set()

    def watch(self, weights: Iterable[Any]) -> Iterator[Any]:
        """The same tensors.

        Raises:
            SlebError: one belongs to a removed block.
        """
        for name, *rest in weights:
            block = self._checkpoint.block_of(name)
            if block is not None:
                self._seen.add(block)
                if block in self._pruning.removed:
                    raise SlebError(
                        f"vLLM read {name} of removed block {block}; this vLLM cannot serve the "
                        f"model pruned"
                    )
            yield (name, *rest)

    def check(self) -> None:
        """Refuse a checkpoint that had nothing for a block that stays.

        Raises:
            SlebError: naming the blocks.
        """
        kept = set(range(self._pruning.num_blocks)) - set(self._pruning.removed)
        missing = sorted(kept - self._seen)
        if missing:
            raise SlebError(
                f"the checkpoint gave no tensor of blocks {missing}; is a shard missing from "
                f"{self._checkpoint.path}?"
            )
