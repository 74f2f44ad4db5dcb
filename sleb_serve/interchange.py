"""Lists of removed blocks as neighbouring tools write and read them.

What is read here becomes a manifest bound to a model, and everything else takes that. Formats:

- a bare list of block numbers, ``[5, 4, 9]`` or ``5,4,9``, as ShortGPT-like scripts print, or a
  JSON object that holds one under a usual name;
- SLEB's own results (``sleb.py`` and ``eval.py`` of https://github.com/jiwonsong-dev/SLEB append a
  run after the other);
- a mergekit passthrough configuration (https://github.com/arcee-ai/mergekit), whose slices say what
  stays;
- a config.json of LLM-Drop (https://github.com/CASE-Lab-UMD/LLM-Drop) that drops whole blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sleb_serve import __version__, strict_json
from sleb_serve.binding import bind
from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest import Manifest, Removal
from sleb_serve.pruning import check_blocks, gaps

_MAX_BYTES = 16 << 20
_LIST_KEYS = ("removed", "removal_list", "layers_to_remove", "removed_layers", "pruned_layers")
_RUN = re.compile(r"^(?:Block )?Removal Order: *(\[.*\]) *$", re.MULTILINE)
_TOTAL = re.compile(r"^# Total Blocks: *(\d+) *$", re.MULTILINE)
_BARE = re.compile(r"\s*\[?\s*\d+(\s*[,\s]\s*\d+)*\s*,?\s*\]?\s*")


@dataclass(frozen=True)
class Found:
    """Removed blocks in order, as far as it is known, and what they were read from."""

    blocks: tuple[int, ...]
    form: str


def imported(source: str, model: str, checkpoint: Checkpoint, run: int | None = None) -> Manifest:
    """A manifest for `model` from a list in another tool's format.

    Args:
        source: a file, or the list itself.
        model: folder or hub id, whose weights are on this machine.
        checkpoint: its files.
        run: which of several runs in SLEB's results, from 1; None for the last.

    Raises:
        SlebError: the list cannot be read, or is not one for this model.
    """
    found = read_blocks(source, checkpoint.num_blocks, run)
    name = Path(source).name if Path(source).is_file() else "the command line"
    return manifest_of(model, checkpoint, found.blocks, f"{found.form} of {name}")


def manifest_of(model: str, checkpoint: Checkpoint, blocks: Sequence[int], origin: str) -> Manifest:
    """A manifest that removes `blocks`, in this order, of a model whose weights are here.

    Raises:
        SlebError: the model has no such blocks.
    """
    count = checkpoint.num_blocks
    beyond = next((block for block in blocks if not 0 <= block < count), None)
    if beyond is not None:
        raise SlebError(f"{origin} names block {beyond}; {model} has blocks 0 to {count - 1}")
    check_blocks(blocks, count, origin)
    return Manifest(
        bind(model, checkpoint),
        tuple(Removal(block) for block in blocks),
        created_by={"sleb_serve": __version__, "imported_from": origin},
    )


def read_blocks(source: str, num_blocks: int, run: int | None = None) -> Found:
    """The removed blocks that a file or a text names; see `imported`."""
    text, where = _text(source)
    if _BARE.fullmatch(text):
        return Found(tuple(int(number) for number in re.findall(r"\d+", text)), "list")
    if runs := list(_RUN.finditer(text)):
        return _official(text, where, runs, num_blocks, run)
    try:
        import yaml

        # JSON is YAML, too.
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unknown(where) from error
    if isinstance(value, list):
        return Found(_numbers(value, where), "list")
    if not isinstance(value, dict):
        raise _unknown(where)
    if "drop_attn_list" in value or "drop_mlp_list" in value:
        return _llm_drop(value, where)
    if "slices" in value:
        return _mergekit(value, where, num_blocks)
    key = next((key for key in _LIST_KEYS if isinstance(value.get(key), list)), None)
    if key is None:
        raise _unknown(where)
    return Found(_numbers(value[key], f"{where}: {key}"), "list")


def mergekit_config(model: str, manifest: Manifest, dtype: str) -> str:
    """A mergekit passthrough configuration that makes the pruned model."""
    removed = manifest.pruning().removed
    lines = ["merge_method: passthrough", f"dtype: {dtype}", "slices:"]
    for first, last in gaps([i for i in range(manifest.model.num_blocks) if i not in removed]):
        lines += [
            "  - sources:",
            f"      - model: {json.dumps(model)}",
            f"        layer_range: [{first}, {last + 1}]",
        ]
    return "\n".join(lines) + "\n"


def llama_cpp_list(manifest: Manifest) -> str:
    """What ``llama-quantize --prune-layers`` takes: the removed blocks."""
    return ",".join(map(str, manifest.pruning().removed))


def _text(source: str) -> tuple[str, str]:
    path = Path(source)
    if _BARE.fullmatch(source) and not path.exists():
        return source, "the list"
    try:
        data = path.read_bytes()
        if len(data) > _MAX_BYTES:
            raise OSError(f"larger than {_MAX_BYTES} bytes")
        return data.decode(), str(path)
    except (OSError, ValueError) as error:
        raise SlebError(
            f"cannot read {strict_json.short(source)}: {first_line(error)}; give a file with "
            f"removed blocks, or the list itself as '[5, 4, 9]'"
        ) from error


def _unknown(where: str) -> SlebError:
    return SlebError(
        f"{where} holds no removed blocks in a form known here: a list of block numbers, SLEB's "
        f"results, a mergekit configuration with slices, or an LLM-Drop config.json"
    )


def _numbers(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(
        isinstance(number, bool) or not isinstance(number, int) for number in value
    ):
        raise SlebError(f"{where} is not a list of block numbers; give one as [5, 4, 9]")
    return tuple(value)


def _official(
    text: str, where: str, runs: Sequence[re.Match[str]], num_blocks: int, run: int | None
) -> Found:
    number = len(runs) if run is None else run
    if not 1 <= number <= len(runs):
        raise SlebError(f"--run {number}: {where} holds {len(runs)} runs; choose one of them")
    start = runs[number - 2].end() if number > 1 else 0
    totals = _TOTAL.findall(text[start : runs[number - 1].start()])
    if totals and int(totals[-1]) != num_blocks:
        raise SlebError(
            f"run {number} of {where} is of a model with {totals[-1]} blocks, this one has "
            f"{num_blocks}; choose another with --run, or give that model"
        )
    try:
        blocks = _numbers(json.loads(runs[number - 1][1]), f"{where}, run {number}")
    except (ValueError, RecursionError) as error:
        raise SlebError(f"{where}, run {number} is not a list of block numbers") from error
    return Found(blocks, f"SLEB's run {number} of {len(runs)}")


def _llm_drop(value: Mapping[str, Any], where: str) -> Found:
    attention, mlp = (
        set(_dropped(value.get(key, []), f"{where}: {key}"))
        for key in ("drop_attn_list", "drop_mlp_list")
    )
    if attention != mlp:
        halves = ", ".join(map(str, sorted(attention ^ mlp)))
        raise SlebError(
            f"{where} drops only the attention or only the MLP of block {halves}; whole blocks can "
            f"be removed, halves cannot"
        )
    return Found(tuple(sorted(attention)), "LLM-Drop's config")


def _dropped(value: object, where: str) -> tuple[int, ...]:
    """A list of block numbers, or, as LLM-Drop also writes it, of one truth value a block."""
    if isinstance(value, list) and value and all(isinstance(entry, bool) for entry in value):
        return tuple(block for block, dropped in enumerate(value) if dropped)
    return _numbers(value, where)


def _mergekit(value: Mapping[str, Any], where: str, num_blocks: int) -> Found:
    if value.get("merge_method", "passthrough") != "passthrough":
        raise SlebError(f"{where} merges models; only merge_method: passthrough removes blocks")
    kept: list[int] = []
    models = set()
    slices = value["slices"] if isinstance(value["slices"], list) else [None]
    for entry in slices:
        sources = entry.get("sources") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
            raise SlebError(f"{where}: each of its slices must have one source")
        limits = _numbers(sources[0].get("layer_range"), f"{where}: layer_range")
        if len(limits) != 2 or not 0 <= limits[0] <= limits[1] <= num_blocks:
            raise SlebError(
                f"{where}: layer_range {list(limits)} does not lie within the model's "
                f"{num_blocks} blocks"
            )
        models.add(json.dumps(sources[0].get("model"), default=str))
        kept += range(*limits)
    if len(models) != 1:
        raise SlebError(f"{where} takes blocks of several models; one model's can be removed")
    if any(after <= before for before, after in pairwise(kept)):
        raise SlebError(f"{where} repeats or moves blocks; only removals can be imported")
    return Found(tuple(i for i in range(num_blocks) if i not in set(kept)), "mergekit's slices")
