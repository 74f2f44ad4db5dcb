"""The removal manifest: a model's removed decoder blocks and their origin.

A manifest is one JSON object (UTF-8, at most 1 MiB, ``schema_version`` 1). Block indices are those
of the original model. ``removed`` is in order of removal, so every prefix is also a pruning. Losses
are mean nats per predicted token.

This module needs neither torch nor vLLM, so manifests can be read and checked anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning, RepairFile
from sleb_serve.utils.atomic_io import write_atomically

SCHEMA_VERSION = 1
OBJECTIVES = ("nll", "kl", "embedding")
"""Objectives. Losses are nats per predicted token of the text, or of divergence from the dense
model; or one minus the cosine of the last hidden states with the dense model's.
"""
MAX_BYTES = 1 << 20


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class ModelBinding:
    """The model a manifest belongs to.

    ``id`` and ``revision`` say where it came from; the architecture, the block count and the
    digests (see `sleb_serve.checkpoint`) are what a model must match to be served by the manifest.
    ``weights_sha256`` and ``block_sha256`` are quick ones, over samples of the tensors.
    """

    id: str
    revision: str | None
    architecture: str
    num_blocks: int
    config_sha256: str
    weights_sha256: str
    block_sha256: tuple[str, ...] | None = None
    """The digest of each block's weights: with it, a server need not read removed blocks."""
    full_sha256: tuple[str, ...] | None = None
    """The digests over all bytes: of what lies outside the blocks, then of each block."""


@dataclass(frozen=True)
class Origin:
    """The original model of a rebound manifest, which has the losses of that model."""

    id: str
    revision: str | None
    config_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Removal:
    """One removed block, and the calibration loss with it and all before it removed."""

    block: int
    loss: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The text that the losses were measured on.

    It has ``sequences`` of ``sequence_length`` tokens, cut from ``rows`` rows (None for a file).
    ``tokens_sha256`` is the digest of the token ids as little-endian int64, sequence after
    sequence.
    """

    source: str
    split: str | None
    sequences: int
    sequence_length: int
    seed: int
    tokens_sha256: str
    rows: int | None = None


@dataclass(frozen=True)
class Selection:
    """The search: SLEB's greedy search, its barriers, the model's dtype.

    Losses are those of the ``objective``: ``nll`` on the text, or ``kl`` from the dense model.
    ``samples`` are the blocks that the same search removes on other samples of the text.
    """

    method: str
    early_barrier: int
    late_barrier: int
    dtype: str
    objective: str = "nll"
    samples: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Training:
    """The training of a healed model.

    ``texts`` are the sources with their weights, ``tokens`` the number of training tokens. On
    held-out text, ``perplexity`` has the values of the dense, pruned and healed models, and
    ``agreement`` the share of positions where the pruned and the healed one have the dense model's
    most likely next token.
    """

    texts: Mapping[str, float]
    tokens: int
    rank: int
    seed: int
    perplexity: Mapping[str, float]
    agreement: Mapping[str, float]


@dataclass(frozen=True)
class Repair:
    """Repair of the first ``blocks`` removals: its kind, the sidecar's name and digest.

    Fitted on ``sequences`` sequences of text. For a fold, ``loss`` is the calibration loss on them
    after the repair.
    """

    kind: str
    file: str
    sha256: str
    blocks: int
    sequences: int
    loss: float | None = None
    training: Training | None = None


@dataclass(frozen=True)
class Golden:
    """The pruned model's log-probabilities for a short prompt, to identify it.

    ``logprobs`` are in nats, for each of the ``tokens`` except the first.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """A removal manifest; see the module's docstring.

    Serving needs only ``model`` and ``removed``; the rest records their origin.
    """

    model: ModelBinding
    removed: tuple[Removal, ...]
    dense_loss: float | None = None
    calibration: Calibration | None = None
    selection: Selection | None = None
    evaluation: Mapping[str, Any] = field(default_factory=_nothing)
    created_by: Mapping[str, str] = field(default_factory=_nothing)
    repairs: tuple[Repair, ...] = ()
    golden: Golden | None = None
    rebound_from: Origin | None = None
    folder: Path | None = field(default=None, compare=False)
    """Folder of the manifest and its sidecar; not part of the file."""
    source: str | None = field(default=None, compare=False)
    """The hub file with its commit that the manifest was read from; not part of the file."""

    @property
    def made_from(self) -> dict[str, str]:
        """Return the hub source for ``created_by`` of derived files."""
        return {} if self.source is None else {"made_from": self.source}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the removed blocks, in order of removal."""
        return tuple(removal.block for removal in self.removed)

    @property
    def repair(self) -> Repair | None:
        """Return the repair for all removals; None if there is none."""
        return self._repair(len(self.removed))

    def _repair(self, blocks: int) -> Repair | None:
        return next((repair for repair in self.repairs if repair.blocks == blocks), None)

    def prefix(self, blocks: int | None) -> Manifest:
        """Return the manifest with only its first ``blocks`` removals (all for None).

        Raises:
            SlebError: ``blocks`` is not between 1 and the number of removals, or the manifest has
                repairs, but not for this number.
        """
        if blocks is None:
            return self
        if not 1 <= blocks <= len(self.removed):
            raise SlebError(
                f"blocks={blocks}: this manifest removes {len(self.removed)} blocks, so K must "
                f"be between 1 and {len(self.removed)}; for more, select with a larger `remove`"
            )
        if blocks == len(self.removed):
            return self
        repair = self._repair(blocks)
        if self.repairs and repair is None:
            known = ", ".join(str(repair.blocks) for repair in self.repairs)
            instead = (
                f"heal with also={blocks}"
                if self.repairs[0].kind == "heal"
                else f"select with remove={blocks} repair=fold for a manifest of its own"
            )
            raise SlebError(
                f"blocks={blocks}: this manifest is repaired for {known} blocks, and another "
                f"number needs another repair; {instead}"
            )
        # The golden log-probabilities are for all removals.
        repairs = () if repair is None else (repair,)
        return replace(self, removed=self.removed[:blocks], repairs=repairs, golden=None)

    def pruning(self, *, full: bool = False) -> Pruning:
        """What a server needs of this manifest; with `full`, to compare all bytes that it reads.

        Raises:
            SlebError: `full`, and the manifest holds no full digest.
        """
        removed = tuple(sorted(self.blocks))
        parts = enumerate(self.full_digests() if full else (), -1)
        digests = self.model.block_sha256
        return Pruning(
            architecture=self.model.architecture,
            num_blocks=self.model.num_blocks,
            config_sha256=self.model.config_sha256,
            weights_sha256=self.model.weights_sha256,
            removed=removed,
            removed_sha256=() if digests is None else tuple(digests[block] for block in removed),
            repair=None if self.repair is None else self.repair_file(self.repair),
            full_sha256=tuple(part for block, part in parts if block not in removed),
        )

    def full_digests(self) -> tuple[str, ...]:
        """`ModelBinding.full_sha256`.

        Raises:
            SlebError: there is none.
        """
        if self.model.full_sha256 is None:
            raise SlebError(
                "the manifest holds no full digest of its model's weights; make it again, of "
                "safetensors, with `sleb-serve select`, `import` or `rebind`"
            )
        return self.model.full_sha256

    def perplexity(self, loss: float | None) -> float | None:
        """Return exp(loss); None if it is undefined, as for a divergence."""
        is_loss = self.selection is None or self.selection.objective == "nll"
        return perplexity_of(loss) if is_loss else None

    def repair_file(self, repair: Repair) -> RepairFile:
        """Return the local path of a repair."""
        path = (self.folder or Path()).resolve() / repair.file
        return RepairFile(repair.kind, repair.sha256, str(path))

    def to_json(self) -> bytes:
        """Serialise the manifest; equal manifests give equal bytes."""
        value: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                name: _thaw(entry)
                for name, entry in vars(self.model).items()
                if name == "revision" or entry is not None
            },
            "removed": [
                {"block": r.block, "loss": r.loss, "perplexity": self.perplexity(r.loss)}
                for r in self.removed
            ],
        }
        if self.dense_loss is not None:
            value["dense"] = {
                "loss": self.dense_loss,
                "perplexity": self.perplexity(self.dense_loss),
            }
        if self.calibration is not None:
            value["calibration"] = dict(vars(self.calibration))
        if self.selection is not None:
            value["selection"] = {
                name: _thaw(entry) for name, entry in vars(self.selection).items() if entry != ()
            }
        if self.repairs:
            value["repairs"] = [
                {
                    name: _thaw(vars(entry) if isinstance(entry, Training) else entry)
                    for name, entry in vars(repair).items()
                    if entry is not None
                }
                for repair in self.repairs
            ]
        if self.golden is not None:
            value["golden"] = {name: _thaw(entry) for name, entry in vars(self.golden).items()}
        if self.rebound_from is not None:
            value["rebound_from"] = dict(vars(self.rebound_from))
        value["evaluation"] = _thaw(self.evaluation)
        value["created_by"] = dict(self.created_by)
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()

    def write(self, path: Path) -> None:
        """Write the manifest to `path`, completely or not at all.

        Raises:
            SlebError: the file cannot be written or would be too large for the reader.
        """
        data = self.to_json()
        if len(data) > MAX_BYTES:
            raise SlebError(
                f"{path}: the manifest would have {len(data)} bytes, more than the {MAX_BYTES} a "
                f"reader accepts; store less under its evaluation"
            )
        write_atomically(path, data)


def perplexity_of(loss: float | None) -> float | None:
    """Return the exponential of a loss in nats per token; None if unknown or too large."""
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def _thaw(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thaw(item) for item in value]
    return value
