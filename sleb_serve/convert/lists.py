"""Lists of removed blocks in the formats of other tools.

An imported list becomes a manifest bound to a model. Formats:

- a bare list of block numbers, ``[5, 4, 9]`` or ``5,4,9``, as ShortGPT-like scripts print, or an
  object with one under a common name (``removed_layers``, ``layers_to_skip``, ...);
- SLEB's own results (``sleb.py`` and ``eval.py`` of https://github.com/jiwonsong-dev/SLEB append
  their runs), or the output of a killed ``sleb.py``;
- a mergekit passthrough configuration (https://github.com/arcee-ai/mergekit), with slices of the
  kept blocks;
- a config.json of LLM-Drop (https://github.com/CASE-Lab-UMD/LLM-Drop) that drops whole blocks.

Blocks keep the source's order, which is the order of removal. Other entries of a source are
accepted if they are known to change no weight, and otherwise refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.convert.found import Found, block_numbers, check_count, check_keys, plain_key
from sleb_serve.convert.llm_drop import of_llm_drop
from sleb_serve.convert.mergekit import of_mergekit
from sleb_serve.convert.plain_yaml import NotYamlError, parsed_yaml
from sleb_serve.convert.sleb_results import of_sleb, sleb_runs
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.blocks import check_blocks
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.utils import strict_json
from sleb_serve.utils.limited import read_limited
from sleb_serve.utils.outputs import beginning_with

LAYER_LIST = beginning_with("a list of layers", rb"[0-9,]+\n\Z")
"""File kind of `llama_cpp_list`."""

_MAX_BYTES = 16 << 20
_BARE = re.compile(r"[\[\]0-9\s,.+-]+")
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]*)?")
_NUMPY = re.compile(r"\bnp\.u?int[0-9]{0,2}\(([0-9]+)\)")
"""NumPy 2's representation of numbers in a list."""
_PRUNEME = "block_start,block_end,average_distance"

_DONE = {"remove": "removed", "prune": "pruned", "drop": "dropped", "skip": "skipped"}
_NOUNS = ("layers", "blocks")
_REMOVED_KEYS = {"removed", "removal_list", "removal_order", "remove_order"} | {
    key
    for verb, done in _DONE.items()
    for noun in _NOUNS
    for key in (f"{done}_{noun}", f"{noun}_{done}", f"{noun}_to_{verb}", f"{verb}_{noun}")
}
_KEPT_KEYS = {
    key
    for noun in _NOUNS
    for key in (f"kept_{noun}", f"{noun}_kept", f"{noun}_to_keep", f"keep_{noun}")
} | {f"{word}_{noun}" for word in ("remaining", "retained") for noun in _NOUNS}
_DENSE_COUNT_KEYS = {
    "original_layers",
    "original_num_layers",
    "original_num_hidden_layers",
    "num_layers_original",
    "num_original_layers",
    "total_layers",
    "total_blocks",
    "num_blocks",
}
_EITHER_COUNT_KEYS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
"""Keys for the dense or the pruned model's layer count, depending on the tool."""


def imported(source: str, model: str, checkpoint: Checkpoint, run: int | None = None) -> Manifest:
    """A manifest for `model` from a list in another tool's format, with quick digests alone.

    Args:
        source: a file, or the list itself.
        model: folder or hub id, with its weights on this machine.
        checkpoint: its files.
        run: which of several runs in SLEB's results, from 1; None for the last.

    Raises:
        SlebError: the list cannot be read or does not fit this model.
    """
    found = read_blocks(source, checkpoint.num_blocks, run)
    name = _shown(Path(source).name) if os.path.isfile(source) else "the command line"
    return manifest_of(model, checkpoint, found.blocks, f"{found.form} of {name}")


def manifest_of(model: str, checkpoint: Checkpoint, blocks: Sequence[int], origin: str) -> Manifest:
    """Create a manifest that removes `blocks`, in this order, from a local model.

    The binding has quick digests only.

    Raises:
        SlebError: the model does not have these blocks.
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
    """Read the removed blocks from a file or a text; see `imported`."""
    text, where = _text(source)
    bare = bare_numbers(text)
    if bare is None and (runs := sleb_runs(text)):
        return of_sleb(runs, where, num_blocks, run)
    if run is not None:
        raise SlebError(f"run={run}: {where} holds no runs of SLEB; leave `run` out")
    if bare is not None:
        return Found(block_numbers(bare, where), "list")
    if text.lstrip().startswith(_PRUNEME):
        raise SlebError(
            f"{where} has PruneMe's distances, not chosen blocks; give the blocks you chose, as "
            "[21, 22, 23]"
        )
    value = parsed(text, where)
    if isinstance(value, list):
        return Found(block_numbers(value, where), "list")
    if not isinstance(value, dict):
        raise unknown_form(where)
    if "schema_version" in value and "removed" in value:
        raise SlebError(f"{where} is a removal manifest already; pass it with -m")
    if "drop_attn_list" in value or "drop_mlp_list" in value:
        return of_llm_drop(value, where, num_blocks)
    if "slices" in value or "merge_method" in value:
        return of_mergekit(value, where, num_blocks)
    return of_lists(value, where, num_blocks)


def llama_cpp_list(manifest: Manifest) -> str:
    """Return the removed blocks as the value of ``llama-quantize --prune-layers``."""
    return ",".join(map(str, manifest.pruning().removed))


def _text(source: str) -> tuple[str, str]:
    is_list = source.lstrip()[:1] in ("[", "{") or bare_numbers(source) is not None
    if is_list and not os.path.exists(source):
        return source, "the list"
    try:
        return read_limited(Path(source), _MAX_BYTES).decode("utf-8-sig"), _shown(source)
    except (OSError, ValueError) as error:
        raise SlebError(
            f"cannot read {strict_json.short(source)}: {first_line(error)}; give a file with "
            f"removed blocks, or the list itself as '[5, 4, 9]'"
        ) from error


def _shown(text: str) -> str:
    return text if text.isprintable() else strict_json.short(text)


def unknown_form(where: str) -> SlebError:
    """Return the error for an unknown source format."""
    return SlebError(
        f"{where} has no list of removed blocks in a known format: a list of block numbers, SLEB's "
        f"results, a mergekit configuration with slices, or an LLM-Drop config.json"
    )


def bare_numbers(text: str) -> list[object] | None:
    """Parse numbers separated by commas or spaces, with or without brackets; else None."""
    inner = _NUMPY.sub(r"\1", text).strip()
    if not _BARE.fullmatch(inner):
        return None
    if inner[0] == "[" and inner[-1] == "]":
        inner = inner[1:-1]
    parts = [part.split() for part in inner.split(",")]
    if not all(parts[:-1]):
        return None
    items = [item for part in parts for item in part]
    if not items or not all(_NUMBER.fullmatch(item) for item in items):
        return None
    return [float(item) if "." in item else int(item) for item in items]


def parsed(text: str, where: str) -> object:
    """Parse a single JSON or YAML value without duplicate keys."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        check_keys((key for key, _ in pairs), where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        pass
    except (RecursionError, ValueError) as error:
        raise unknown_form(where) from error
    try:
        return parsed_yaml(text, where)
    except NotYamlError as error:
        raise unknown_form(where) from error


def of_lists(value: Mapping[Any, Any], where: str, num_blocks: int) -> Found:
    """Read a list under a common name; other entries about blocks must agree with it."""
    named = {plain_key(key): entry for key, entry in value.items()}
    check_keys((plain_key(key) for key in value), where)
    there = [key for key in named if key in _REMOVED_KEYS and named[key] is not None]
    lists = {
        key: block_numbers(named[key], f"{where}: {key}")
        for key in there
        if isinstance(named[key], list)
    }
    if not lists:
        if there:
            raise SlebError(
                f"{where}: {there[0]} is not a list of block numbers; give one as [5, 4, 9]"
            )
        kept = next((key for key in named if key in _KEPT_KEYS), None)
        if kept is not None:
            raise SlebError(f"{where}: {kept} lists kept blocks; give the removed blocks as a list")
        raise unknown_form(where)
    # An ascending list may be a sorted copy of one in order of removal.
    orders = {blocks for blocks in lists.values() if list(blocks) != sorted(blocks)}
    blocks = next(iter(orders or lists.values()))
    if len(orders) > 1 or any(sorted(other) != sorted(blocks) for other in lists.values()):
        raise SlebError(f"{where}: {' and '.join(lists)} disagree; give the intended one")
    for key, entry in named.items():
        if key in _KEPT_KEYS and isinstance(entry, list):
            stays = block_numbers(entry, f"{where}: {key}")
            if sorted((*stays, *blocks)) != list(range(num_blocks)):
                raise SlebError(
                    f"{where}: {key} and {next(iter(lists))} are not the {num_blocks} blocks of "
                    f"this model; give that model, or the list alone"
                )
        after = num_blocks - len(blocks)
        if key in _DENSE_COUNT_KEYS or (key in _EITHER_COUNT_KEYS and entry != after):
            check_count(entry, num_blocks, where, key)
    return Found(blocks, "list")
