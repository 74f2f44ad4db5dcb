"""The removal manifest: which decoder blocks of which model are left out, and why.

A manifest is one JSON object (UTF-8, at most 1 MiB, ``schema_version`` 1). Block indices are those
of the original model. ``removed`` is in order of removal, so every prefix is a pruning of its own.
Losses are mean nats per predicted token.

This module knows no torch and no vLLM: a manifest can be read and checked anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.pruning import Pruning, RepairFile, block_count, check_blocks, repair_kind
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import write_atomically

SCHEMA_VERSION = 1
OBJECTIVES = ("nll", "kl", "embedding")
"""What losses are: nats per predicted token of the text, or of divergence from the dense model; or
one minus the cosine of the last hidden states with the dense model's."""
MAX_BYTES = 1 << 20


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class ModelBinding:
    """The model a manifest belongs to.

    ``id`` and ``revision`` say where it came from; the architecture, the block count and the two
    digests (see `sleb_serve.checkpoint`) are what a model must match to be served by the manifest.
    """

    id: str
    revision: str | None
    architecture: str
    num_blocks: int
    config_sha256: str
    weights_sha256: str
    block_sha256: tuple[str, ...] | None = None
    """The digest of each block's weights: with it, a server need not read removed blocks."""


@dataclass(frozen=True)
class Removal:
    """One removed block, and the model's calibration loss once it and all before it are gone."""

    block: int
    loss: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The text that the losses were measured on.

    ``sequences`` windows of ``sequence_length`` tokens; ``rows`` counts the data-set rows they were
    cut from (None for a file). ``tokens_sha256`` is the digest of the token ids as little-endian
    int64, window after window.
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
    """How the blocks were searched for: SLEB's greedy search, its barriers, the model's dtype.

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
class Repair:
    """How the gaps are repaired: the kind, the sidecar's name beside the manifest, its digest.

    Fitted on ``sequences`` windows of the calibration text; ``loss`` is that on them, repaired.
    """

    kind: str
    file: str
    sha256: str
    sequences: int
    loss: float | None = None


@dataclass(frozen=True)
class Golden:
    """What the pruned model made of a short prompt when it was selected, to know it by.

    ``logprobs`` are those of each of the ``tokens`` but the first, in nats.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """A removal manifest; see the module's docstring.

    Only ``model`` and ``removed`` are needed to serve; the rest records where they came from.
    """

    model: ModelBinding
    removed: tuple[Removal, ...]
    dense_loss: float | None = None
    calibration: Calibration | None = None
    selection: Selection | None = None
    evaluation: Mapping[str, Any] = field(default_factory=_nothing)
    created_by: Mapping[str, str] = field(default_factory=_nothing)
    repair: Repair | None = None
    golden: Golden | None = None
    folder: Path | None = field(default=None, compare=False)
    """Where the manifest was read from, and its sidecar lies; not part of the file."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The removed blocks, in order of removal."""
        return tuple(removal.block for removal in self.removed)

    def prefix(self, blocks: int | None) -> Manifest:
        """The manifest with only its first ``blocks`` removals (all of them for None).

        Raises:
            SlebError: ``blocks`` is not between 1 and the number of removals.
        """
        if blocks is None:
            return self
        if not 1 <= blocks <= len(self.removed):
            raise SlebError(
                f"--blocks {blocks}: this manifest removes {len(self.removed)} blocks, so K must "
                f"be between 1 and {len(self.removed)}; for more, select with a larger --remove"
            )
        if self.repair is not None and blocks < len(self.removed):
            raise SlebError(
                f"--blocks {blocks}: this manifest is repaired for {len(self.removed)} blocks, and "
                f"fewer need another repair; select with --remove {blocks} --repair "
                f"{self.repair.kind} for a manifest of its own"
            )
        if blocks == len(self.removed):
            return self
        # Golden log-probabilities are those of all removals.
        return replace(self, removed=self.removed[:blocks], golden=None)

    def pruning(self) -> Pruning:
        """What a server needs of this manifest."""
        removed = tuple(sorted(self.blocks))
        digests = self.model.block_sha256
        return Pruning(
            architecture=self.model.architecture,
            num_blocks=self.model.num_blocks,
            config_sha256=self.model.config_sha256,
            weights_sha256=self.model.weights_sha256,
            removed=removed,
            removed_sha256=() if digests is None else tuple(digests[block] for block in removed),
            repair=None if self.repair is None else self._repair_file(self.repair),
        )

    def perplexity(self, loss: float | None) -> float | None:
        """exp(loss); None where there is no such thing, as for a divergence."""
        is_loss = self.selection is None or self.selection.objective == "nll"
        return perplexity_of(loss) if is_loss else None

    def _repair_file(self, repair: Repair) -> RepairFile:
        path = (self.folder or Path()).resolve() / repair.file
        return RepairFile(repair.kind, repair.sha256, str(path))

    def to_json(self) -> bytes:
        """The manifest as the bytes of its file; equal manifests give equal bytes."""
        value: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                name: _thaw(entry)
                for name, entry in vars(self.model).items()
                if name != "block_sha256" or entry is not None
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
        if self.repair is not None:
            value["repair"] = {k: v for k, v in vars(self.repair).items() if v is not None}
        if self.golden is not None:
            value["golden"] = {name: _thaw(entry) for name, entry in vars(self.golden).items()}
        value["evaluation"] = _thaw(self.evaluation)
        value["created_by"] = dict(self.created_by)
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()

    def write(self, path: Path) -> None:
        """Write the manifest to `path`, whole or not at all.

        Raises:
            SlebError: the file cannot be written, or would be larger than a reader accepts.
        """
        data = self.to_json()
        if len(data) > MAX_BYTES:
            raise SlebError(
                f"{path}: the manifest would have {len(data)} bytes, more than the {MAX_BYTES} a "
                f"reader accepts; store less under its evaluation"
            )
        write_atomically(path, data)


def read_manifest(path: Path) -> Manifest:
    """Read and validate the manifest file at `path`.

    Raises:
        SlebError: the file cannot be read or is not a valid manifest; the message names the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SlebError(
            f"cannot read manifest {path}: {first_line(error)}; "
            f"`sleb-serve select` writes manifests"
        ) from error
    try:
        return replace(parse_manifest(data), folder=path.parent)
    except SlebError as error:
        raise SlebError(f"{path}: {error}") from None


def parse_manifest(data: bytes) -> Manifest:
    """Parse and validate the bytes of a manifest file.

    Raises:
        SlebError: for anything that is not exactly the format, naming the offending part.
    """
    if len(data) > MAX_BYTES:
        raise SlebError(
            f"larger than {MAX_BYTES} bytes, which no removal manifest is; check the path"
        )
    fields = strict_json.object_(
        strict_json.load(data),
        "manifest",
        required=("schema_version", "model", "removed"),
        optional=(
            *("dense", "calibration", "selection", "repair", "golden", "evaluation"),
            "created_by",
        ),
    )
    version = strict_json.integer(fields["schema_version"], "schema_version", 0, 1 << 31)
    if version != SCHEMA_VERSION:
        raise SlebError(
            f"schema_version is {version}, this sleb-serve reads {SCHEMA_VERSION}; "
            f"upgrade sleb-serve or select anew"
        )
    model = _parse_model(fields["model"])
    removed = tuple(
        _parse_removal(entry, f"removed[{i}]", model.num_blocks)
        for i, entry in enumerate(strict_json.list_(fields["removed"], "removed"))
    )
    check_blocks([r.block for r in removed], model.num_blocks, "removed")
    dense = fields.get("dense")
    calibration = fields.get("calibration")
    selection = fields.get("selection")
    evaluation = strict_json.any_object(fields.get("evaluation", {}), "evaluation")
    created_by = strict_json.any_object(fields.get("created_by", {}), "created_by")
    repair = fields.get("repair")
    return Manifest(
        model=model,
        removed=removed,
        repair=None if repair is None else _parse_repair(repair),
        golden=_parse_golden(fields["golden"]) if "golden" in fields else None,
        dense_loss=None if dense is None else _parse_loss(dense, "dense"),
        calibration=None if calibration is None else _parse_calibration(calibration),
        selection=None if selection is None else _parse_selection(selection, model.num_blocks),
        evaluation=MappingProxyType(evaluation),
        created_by=MappingProxyType(
            {key: strict_json.line(value, f"created_by.{key}") for key, value in created_by.items()}
        ),
    )


def perplexity_of(loss: float | None) -> float | None:
    """The exponential of a loss in nats per token; None if unknown or beyond a float."""
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def _parse_model(value: object) -> ModelBinding:
    keys = ("id", "revision", "architecture", "num_blocks", "config_sha256", "weights_sha256")
    fields = strict_json.object_(value, "model", required=keys, optional=("block_sha256",))
    revision = fields["revision"]
    num_blocks = block_count(fields["num_blocks"], "model.num_blocks")
    digests = fields.get("block_sha256")
    if digests is not None:
        digests = tuple(
            strict_json.sha256(digest, f"model.block_sha256[{i}]")
            for i, digest in enumerate(strict_json.list_(digests, "model.block_sha256"))
        )
        if len(digests) != num_blocks:
            raise SlebError(
                f"model.block_sha256 has {len(digests)} digests for {num_blocks} blocks; select "
                f"anew"
            )
    return ModelBinding(
        id=strict_json.line(fields["id"], "model.id"),
        revision=None if revision is None else strict_json.line(revision, "model.revision"),
        architecture=strict_json.line(fields["architecture"], "model.architecture"),
        num_blocks=num_blocks,
        config_sha256=strict_json.sha256(fields["config_sha256"], "model.config_sha256"),
        weights_sha256=strict_json.sha256(fields["weights_sha256"], "model.weights_sha256"),
        block_sha256=digests,
    )


def _parse_loss(value: object, where: str, extra: Sequence[str] = ()) -> float | None:
    fields = strict_json.object_(value, where, required=extra, optional=("loss", "perplexity"))
    loss = fields.get("loss")
    perplexity = fields.get("perplexity")
    if perplexity is not None:
        found = strict_json.number(perplexity, f"{where}.perplexity")
        expected = perplexity_of(strict_json.number(loss, f"{where}.loss"))
        # People round when they write by hand; two numbers that contradict each other are refused.
        if expected is None or not math.isclose(found, expected, rel_tol=0.01):
            raise SlebError(
                f"{where}.perplexity is {found:g}, but exp(loss) is {expected or math.inf:g}; "
                f"the file was edited: correct one of them"
            )
    return None if loss is None else strict_json.number(loss, f"{where}.loss")


def _parse_removal(value: object, where: str, num_blocks: int) -> Removal:
    loss = _parse_loss(value, where, extra=("block",))
    assert isinstance(value, dict)
    return Removal(strict_json.integer(value["block"], f"{where}.block", 0, num_blocks - 1), loss)


def _parse_calibration(value: object) -> Calibration:
    fields = strict_json.object_(
        value,
        "calibration",
        required=("source", "split", "sequences", "sequence_length", "seed", "tokens_sha256"),
        optional=("rows",),
    )
    split = fields["split"]
    rows = fields.get("rows")
    return Calibration(
        source=strict_json.line(fields["source"], "calibration.source"),
        split=None if split is None else strict_json.line(split, "calibration.split"),
        sequences=strict_json.integer(fields["sequences"], "calibration.sequences", 1, 1 << 31),
        sequence_length=strict_json.integer(
            fields["sequence_length"], "calibration.sequence_length", 2, 1 << 31
        ),
        seed=strict_json.integer(fields["seed"], "calibration.seed", 0, 1 << 62),
        tokens_sha256=strict_json.sha256(fields["tokens_sha256"], "calibration.tokens_sha256"),
        rows=None if rows is None else strict_json.integer(rows, "calibration.rows", 1, 1 << 62),
    )


def _parse_selection(value: object, num_blocks: int) -> Selection:
    fields = strict_json.object_(
        value,
        "selection",
        required=("method", "early_barrier", "late_barrier", "dtype"),
        optional=("objective", "samples"),
    )
    objective = strict_json.line(fields.get("objective", "nll"), "selection.objective")
    if objective not in OBJECTIVES:
        raise SlebError(
            f"selection.objective must be one of {', '.join(OBJECTIVES)}, found "
            f"{strict_json.short(objective)}; upgrade sleb-serve or select anew"
        )
    return Selection(
        method=strict_json.line(fields["method"], "selection.method"),
        early_barrier=strict_json.integer(
            fields["early_barrier"], "selection.early_barrier", 0, num_blocks
        ),
        late_barrier=strict_json.integer(
            fields["late_barrier"], "selection.late_barrier", 0, num_blocks
        ),
        dtype=strict_json.line(fields["dtype"], "selection.dtype"),
        objective=objective,
        samples=tuple(
            _parse_sample(entry, f"selection.samples[{i}]", num_blocks)
            for i, entry in enumerate(
                strict_json.list_(fields.get("samples", []), "selection.samples")
            )
        ),
    )


def _parse_sample(value: object, where: str, num_blocks: int) -> tuple[int, ...]:
    blocks = tuple(
        strict_json.integer(block, f"{where}[{i}]", 0, num_blocks - 1)
        for i, block in enumerate(strict_json.list_(value, where))
    )
    check_blocks(blocks, num_blocks, where)
    return blocks


def _parse_repair(value: object) -> Repair:
    fields = strict_json.object_(
        value, "repair", required=("kind", "file", "sha256", "sequences"), optional=("loss",)
    )
    name = strict_json.line(fields["file"], "repair.file")
    if Path(name).name != name or name in (".", ".."):
        raise SlebError(
            f"repair.file must be a file's name beside the manifest, found "
            f"{strict_json.short(name)}; select anew"
        )
    return Repair(
        kind=repair_kind(fields["kind"], "repair.kind"),
        file=name,
        sha256=strict_json.sha256(fields["sha256"], "repair.sha256"),
        sequences=strict_json.integer(fields["sequences"], "repair.sequences", 1, 1 << 31),
        loss=strict_json.number(fields["loss"], "repair.loss") if "loss" in fields else None,
    )


def _parse_golden(value: object) -> Golden:
    fields = strict_json.object_(value, "golden", required=("tokens", "logprobs"))
    tokens = tuple(
        strict_json.integer(token, f"golden.tokens[{i}]", 0, 1 << 31)
        for i, token in enumerate(strict_json.list_(fields["tokens"], "golden.tokens"))
    )
    logprobs = tuple(
        strict_json.number(value, f"golden.logprobs[{i}]")
        for i, value in enumerate(strict_json.list_(fields["logprobs"], "golden.logprobs"))
    )
    if len(tokens) < 2 or len(logprobs) != len(tokens) - 1:
        raise SlebError("golden: one log-probability for each token but the first is needed")
    return Golden(tokens, logprobs)


def _thaw(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thaw(item) for item in value]
    return value
