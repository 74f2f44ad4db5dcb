"""Strict reading of manifest files."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.blocks import block_count, check_blocks
from sleb_serve.manifest.repair_entries import parse_repairs
from sleb_serve.manifest.repair_file import check_sidecar
from sleb_serve.manifest.repository import Fetched, HubFile, fetch, fetch_beside, hub_file
from sleb_serve.manifest.schema import (
    MAX_BYTES,
    OBJECTIVES,
    SCHEMA_VERSION,
    Calibration,
    Golden,
    Manifest,
    ModelBinding,
    Origin,
    Removal,
    Selection,
    perplexity_of,
)
from sleb_serve.utils import strict_json
from sleb_serve.utils.outputs import object_with

MANIFEST = object_with("a removal manifest", "schema_version", "removed")

_LOG = logging.getLogger(__name__)


def read_manifest(source: str | Path, *, repairs: bool = True) -> Manifest:
    """Read and validate a manifest.

    Args:
        source: a file, or ``org/name`` or ``hf://org/name@revision/file.json`` for a hub
            repository; see `sleb_serve.manifest.repository`.
        repairs: for a repository, also download the repairs and verify them.

    Raises:
        SlebError: the manifest cannot be read or is invalid, or one of a repository's repairs is
            missing or differs; the message names the file.
    """
    asked = hub_file(source) if isinstance(source, str) else None
    if asked is None:
        return _read(Path(source), str(source))
    found = fetch(asked)
    manifest = replace(_read(found.path, str(found.source)), source=str(found.source))
    if found.before is not None:
        _tell_moved(asked, found.before, manifest)
    for repair in manifest.repairs if repairs else ():
        fetch_beside(found.source, repair.file)
        check_sidecar(manifest.repair_file(repair))
    return manifest


def _read(path: Path, name: str) -> Manifest:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        advice = "`sleb-serve select` writes manifests"
        if path.is_dir():
            advice = "give a file in it, or hf://organisation/name for the hub"
        raise SlebError(f"cannot read manifest {name}: {first_line(error)}; {advice}") from error
    try:
        return replace(parse_manifest(data), folder=path.parent)
    except SlebError as error:
        advice = "" if ";" in str(error) else "; restore the file, or re-run `sleb-serve select`"
        raise SlebError(f"{name}: {error}{advice}") from None


def _tell_moved(asked: HubFile, before: Fetched, manifest: Manifest) -> None:
    """Warn that a name points to a different commit than when it was last read here."""
    changed = "an invalid manifest became a valid one"
    with contextlib.suppress(SlebError):
        old = _read(before.path, str(before.source))
        changed = ", ".join(
            f"{name} was {list(was)}, is {list(now)}" if name == "blocks" else f"{name} changed"
            for name in ("blocks", "model", "repairs", "golden", "evaluation")
            if (was := getattr(old, name)) != (now := getattr(manifest, name))
        )
    _LOG.warning(
        "%s has moved to %s: %s; to stay with what was read here before, give %s",
        asked,
        manifest.source,
        changed or "the manifest serves the same",
        before.source,
    )


def parse_manifest(data: bytes) -> Manifest:
    """Parse and validate the bytes of a manifest file.

    Raises:
        SlebError: the format is violated; the message names the offending part.
    """
    if len(data) > MAX_BYTES:
        raise SlebError(
            f"larger than {MAX_BYTES} bytes, so it is not a removal manifest; check the path"
        )
    fields = strict_json.object_(
        strict_json.load(data),
        "manifest",
        required=("schema_version", "model", "removed"),
        optional=(
            *("dense", "calibration", "selection", "repairs", "golden", "rebound_from"),
            *("evaluation", "created_by"),
        ),
    )
    version = strict_json.integer(fields["schema_version"], "schema_version", 0, 1 << 31)
    if version != SCHEMA_VERSION:
        raise SlebError(
            f"schema_version is {version}, this sleb-serve reads {SCHEMA_VERSION}; "
            f"upgrade sleb-serve, or re-run `sleb-serve select`"
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
    return Manifest(
        model=model,
        removed=removed,
        repairs=parse_repairs(fields.get("repairs", []), len(removed)),
        golden=_parse_golden(fields["golden"]) if "golden" in fields else None,
        rebound_from=_parse_origin(fields["rebound_from"]) if "rebound_from" in fields else None,
        dense_loss=None if dense is None else _parse_loss(dense, "dense"),
        calibration=None if calibration is None else _parse_calibration(calibration),
        selection=None if selection is None else _parse_selection(selection, model.num_blocks),
        evaluation=MappingProxyType(evaluation),
        created_by=MappingProxyType(
            {key: strict_json.line(value, f"created_by.{key}") for key, value in created_by.items()}
        ),
    )


def _parse_model(value: object) -> ModelBinding:
    keys = ("id", "revision", "architecture", "num_blocks", "config_sha256", "weights_sha256")
    fields = strict_json.object_(
        value, "model", required=keys, optional=("block_sha256", "full_sha256")
    )
    num_blocks = block_count(fields["num_blocks"], "model.num_blocks")
    return ModelBinding(
        id=strict_json.line(fields["id"], "model.id"),
        revision=_line_or_none(fields["revision"], "model.revision"),
        architecture=strict_json.line(fields["architecture"], "model.architecture"),
        num_blocks=num_blocks,
        config_sha256=strict_json.sha256(fields["config_sha256"], "model.config_sha256"),
        weights_sha256=strict_json.sha256(fields["weights_sha256"], "model.weights_sha256"),
        block_sha256=_digests(fields, "block_sha256", num_blocks, f"{num_blocks} blocks"),
        full_sha256=_digests(
            fields, "full_sha256", num_blocks + 1, f"{num_blocks} blocks and the rest of the model"
        ),
    )


def _digests(
    fields: Mapping[str, Any], key: str, count: int, needed: str
) -> tuple[str, ...] | None:
    if fields.get(key) is None:
        return None
    found = tuple(
        strict_json.sha256(digest, f"model.{key}[{i}]")
        for i, digest in enumerate(strict_json.list_(fields[key], f"model.{key}"))
    )
    if len(found) != count:
        raise SlebError(f"model.{key} has {len(found)} digests for {needed}")
    return found


def _line_or_none(value: object, where: str) -> str | None:
    return None if value is None else strict_json.line(value, where)


def _parse_origin(value: object) -> Origin:
    where = "rebound_from"
    keys = ("id", "revision", "config_sha256", "weights_sha256")
    fields = strict_json.object_(value, where, required=keys)
    return Origin(
        id=strict_json.line(fields["id"], f"{where}.id"),
        revision=_line_or_none(fields["revision"], f"{where}.revision"),
        config_sha256=strict_json.sha256(fields["config_sha256"], f"{where}.config_sha256"),
        weights_sha256=strict_json.sha256(fields["weights_sha256"], f"{where}.weights_sha256"),
    )


def _parse_loss(value: object, where: str, extra: Sequence[str] = ()) -> float | None:
    fields = strict_json.object_(value, where, required=extra, optional=("loss", "perplexity"))
    loss = fields.get("loss")
    perplexity = fields.get("perplexity")
    if perplexity is not None:
        found = strict_json.number(perplexity, f"{where}.perplexity")
        expected = perplexity_of(strict_json.number(loss, f"{where}.loss"))
        # Handwritten values may be rounded; contradictory numbers are refused.
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
    rows = fields.get("rows")
    return Calibration(
        source=strict_json.line(fields["source"], "calibration.source"),
        split=_line_or_none(fields["split"], "calibration.split"),
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
            f"{strict_json.short(objective)}; upgrade sleb-serve, or re-run `sleb-serve select`"
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
