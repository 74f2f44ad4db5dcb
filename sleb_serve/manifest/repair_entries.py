"""Strict parsing of a manifest's repairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import repair_kind
from sleb_serve.manifest.schema import Repair, Training
from sleb_serve.utils import strict_json


def parse_repairs(value: object, num_removed: int) -> tuple[Repair, ...]:
    """Parse the repairs of a manifest.

    Raises:
        SlebError: the format is violated; the message names the offending part.
    """
    repairs = tuple(
        _parse_repair(entry, f"repairs[{i}]", num_removed)
        for i, entry in enumerate(strict_json.list_(value, "repairs"))
    )
    if len({repair.blocks for repair in repairs}) < len(repairs):
        raise SlebError("repairs: two are for the same number of blocks; make the repair again")
    return repairs


def _parse_repair(value: object, where: str, num_removed: int) -> Repair:
    fields = strict_json.object_(
        value,
        where,
        required=("kind", "file", "sha256", "blocks", "sequences"),
        optional=("loss", "training"),
    )
    name = strict_json.line(fields["file"], f"{where}.file")
    if Path(name).name != name or name in (".", ".."):
        raise SlebError(
            f"{where}.file must be a file's name beside the manifest, found "
            f"{strict_json.short(name)}"
        )
    return Repair(
        kind=repair_kind(fields["kind"], f"{where}.kind"),
        file=name,
        sha256=strict_json.sha256(fields["sha256"], f"{where}.sha256"),
        blocks=strict_json.integer(fields["blocks"], f"{where}.blocks", 1, num_removed),
        sequences=strict_json.integer(fields["sequences"], f"{where}.sequences", 1, 1 << 31),
        loss=strict_json.number(fields["loss"], f"{where}.loss") if "loss" in fields else None,
        training=(
            _parse_training(fields["training"], f"{where}.training")
            if "training" in fields
            else None
        ),
    )


def _parse_training(value: object, where: str) -> Training:
    keys = ("texts", "tokens", "rank", "seed", "perplexity", "agreement")
    fields = strict_json.object_(value, where, required=keys)

    def numbers(key: str) -> Mapping[str, float]:
        entries = strict_json.any_object(fields[key], f"{where}.{key}")
        return MappingProxyType(
            {
                strict_json.line(name, f"{where}.{key}"): strict_json.number(
                    entry, f"{where}.{key}.{name}"
                )
                for name, entry in entries.items()
            }
        )

    return Training(
        texts=numbers("texts"),
        tokens=strict_json.integer(fields["tokens"], f"{where}.tokens", 1, 1 << 62),
        rank=strict_json.integer(fields["rank"], f"{where}.rank", 1, 1 << 31),
        seed=strict_json.integer(fields["seed"], f"{where}.seed", 0, 1 << 62),
        perplexity=numbers("perplexity"),
        agreement=numbers("agreement"),
    )
