"""Lists of removed blocks as neighbouring tools write and read them.

What is read here becomes a manifest bound to a model, and everything else takes that. Formats:

- a bare list of block numbers, ``[5, 4, 9]`` or ``5,4,9``, as ShortGPT-like scripts print, or an
  object that holds one under a usual name (``removed_layers``, ``layers_to_skip``, ...);
- SLEB's own results (``sleb.py`` and ``eval.py`` of https://github.com/jiwonsong-dev/SLEB append a
  run after the other), or what ``sleb.py`` had printed when it was killed;
- a mergekit passthrough configuration (https://github.com/arcee-ai/mergekit), whose slices say what
  stays;
- a config.json of LLM-Drop (https://github.com/CASE-Lab-UMD/LLM-Drop) that drops whole blocks.

Blocks keep the source's order, which is the order of removal. What a source says beyond its blocks
is either known to change no weight, or refused by its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.manifest import Manifest, Removal
from sleb_serve.manifest.pruning import MAX_BLOCKS, check_blocks, gaps
from sleb_serve.utils import strict_json

_MAX_BYTES = 16 << 20
_MAX_YAML = 256 << 10
"""Characters; a configuration by hand is shorter, and the YAML reader is slow."""

_ORDER = re.compile(r"\bRemoval Order: *(\[.*)$")
_PROGRESS = re.compile(r"\b(?:current block removal list|current skip list): *(\[.*)$", re.I)
_TOTAL = re.compile(r"^# Total Blocks: *([0-9]{1,9}) *$")
_BARE = re.compile(r"[\[\]0-9\s,.+-]+")
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]*)?")
_NUMPY = re.compile(r"\bnp\.u?int[0-9]{0,2}\(([0-9]+)\)")
"""How NumPy 2 prints the numbers of a list."""
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
"""Tools write the dense model's count there, or the pruned one's."""

_MERGEKIT_TOP = {
    "slices",
    "merge_method",
    "parameters",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
}
_MERGEKIT_IGNORED = {"int8_mask", "normalize"}
"""Parameters of other merge methods, often left in a file; passthrough reads none but scale."""


@dataclass(frozen=True)
class Found:
    """Removed blocks in order, as far as it is known, and what they were read from."""

    blocks: tuple[int, ...]
    form: str


@dataclass(frozen=True)
class _Run:
    """A run of SLEB as its output tells of it; ``blocks`` is None if the list cannot be read."""

    blocks: list[Any] | None
    total: int | None
    finished: bool


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
    name = _shown(Path(source).name) if os.path.isfile(source) else "the command line"
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
    bare = _bare(text)
    if bare is None and (runs := _sleb_runs(text)):
        return _sleb(runs, where, num_blocks, run)
    if run is not None:
        raise SlebError(f"--run {run}: {where} holds no runs of SLEB; leave --run out")
    if bare is not None:
        return Found(_numbers(bare, where), "list")
    if text.lstrip().startswith(_PRUNEME):
        raise SlebError(
            f"{where} holds PruneMe's distances, not a choice of blocks; give the blocks you "
            f"chose, as [21, 22, 23]"
        )
    value = _parsed(text, where)
    if isinstance(value, list):
        return Found(_numbers(value, where), "list")
    if not isinstance(value, dict):
        raise _unknown(where)
    if "schema_version" in value and "removed" in value:
        raise SlebError(f"{where} is a removal manifest already; pass it with -m")
    if "drop_attn_list" in value or "drop_mlp_list" in value:
        return _llm_drop(value, where, num_blocks)
    if "slices" in value or "merge_method" in value:
        return _mergekit(value, where, num_blocks)
    return _listed(value, where, num_blocks)


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
    is_list = source.lstrip()[:1] in ("[", "{") or _bare(source) is not None
    if is_list and not os.path.exists(source):
        return source, "the list"
    try:
        with open(source, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise OSError(f"larger than {_MAX_BYTES} bytes")
        return data.decode("utf-8-sig"), _shown(source)
    except (OSError, ValueError) as error:
        raise SlebError(
            f"cannot read {strict_json.short(source)}: {first_line(error)}; give a file with "
            f"removed blocks, or the list itself as '[5, 4, 9]'"
        ) from error


def _shown(text: str) -> str:
    return text if text.isprintable() else strict_json.short(text)


def _unknown(where: str) -> SlebError:
    return SlebError(
        f"{where} holds no removed blocks in a form known here: a list of block numbers, SLEB's "
        f"results, a mergekit configuration with slices, or an LLM-Drop config.json"
    )


def _bare(text: str) -> list[object] | None:
    """Numbers between commas or blanks, with or without brackets; None if it is something else."""
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


def _parsed(text: str, where: str) -> object:
    """The one JSON or YAML value of a text, with no key twice in an object."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        _check_keys((key for key, _ in pairs), where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        return _parsed_yaml(text, where)
    except (RecursionError, ValueError) as error:
        raise _unknown(where) from error


def _parsed_yaml(text: str, where: str) -> object:
    import yaml

    if len(text) > _MAX_YAML:
        raise _unknown(where)
    values = []
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            _check_nodes(node, where)
            values.append(loader.construct_document(node))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unknown(where) from error
    values = [value for value in values if value is not None]
    if len(values) > 1:
        raise SlebError(
            f"{where} holds {len(values)} YAML documents; give a file with the one that is meant"
        )
    return values[0] if values else None


def _check_nodes(root: Any, where: str) -> None:
    """Refuse keys that stand twice, and merge keys, which can grow without bounds."""
    import yaml

    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if any(key.tag == "tag:yaml.org,2002:merge" for key in keys):
                raise SlebError(f"{where} uses YAML's merge key <<; write out what it stands for")
            _check_keys((key.value for key in keys), where)
            left += [value for _, value in node.value]


def _check_keys(keys: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise SlebError(
                f"{where}: key {strict_json.short(key)} stands twice in one object; remove one"
            )
        seen.add(key)


def _numbers(value: object, where: str) -> tuple[int, ...]:
    why = None
    if isinstance(value, list):
        why = next((why for entry in value if (why := _why_no_block(entry))), None)
        if why is None:
            return tuple(value)
    reason = "" if why is None else f": {why}"
    raise SlebError(f"{where} is not a list of block numbers{reason}; give one as [5, 4, 9]")


def _why_no_block(entry: object) -> str | None:
    if isinstance(entry, bool):
        return f"it holds {str(entry).lower()}"
    if isinstance(entry, int):
        if entry < 0:
            return "it holds a negative number, and blocks count from 0"
        return "it holds a number beyond any model's blocks" if entry > MAX_BLOCKS else None
    if isinstance(entry, float):
        return f"it holds {entry}; whole numbers have no fraction"
    if isinstance(entry, str):
        return f"it holds the text {strict_json.short(entry)}"
    return "it holds something else than numbers"


def _check_count(count: object, num_blocks: int, where: str, key: str) -> None:
    """Refuse a source that was made for a model with another number of blocks."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_BLOCKS:
        raise SlebError(f"{where}: {key} is not a number of blocks; correct it or remove it")
    if count != num_blocks:
        raise SlebError(
            f"{where} is of a model with {count} blocks ({key}), this one has {num_blocks}; give "
            f"that model"
        )


def _sleb_runs(text: str) -> list[_Run]:
    """The runs in SLEB's result file or output, in order.

    ``sleb.py`` prints the list after each removal and its final order at the end. A list that does
    not go on from the one before belongs to another run.
    """
    runs: list[_Run] = []
    open_run: _Run | None = None
    total = None
    for line in text.splitlines():
        if found := _TOTAL.match(line):
            total = int(found[1])
        elif found := _PROGRESS.search(line):
            blocks = _list_in(found[1])
            if open_run is not None and not _goes_on(open_run.blocks, blocks):
                runs.append(open_run)
            open_run = _Run(blocks, None, finished=False)
        elif found := _ORDER.search(line):
            blocks = _list_in(found[1])
            if open_run is not None and not _goes_on(open_run.blocks, blocks):
                runs.append(open_run)
            runs.append(_Run(blocks, total, finished=True))
            open_run = total = None
    return runs if open_run is None else [*runs, open_run]


def _list_in(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _goes_on(before: list[Any] | None, after: list[Any] | None) -> bool:
    return before is not None and after is not None and after[: len(before)] == before


def _sleb(runs: Sequence[_Run], where: str, num_blocks: int, number: int | None) -> Found:
    number = len(runs) if number is None else number
    if not 1 <= number <= len(runs):
        raise SlebError(f"--run {number}: {where} holds {len(runs)} runs; choose one of them")
    run = runs[number - 1]
    if run.total is not None and run.total != num_blocks:
        raise SlebError(
            f"run {number} of {where} is of a model with {run.total} blocks, this one has "
            f"{num_blocks}; choose another with --run, or give that model"
        )
    blocks = _numbers(run.blocks, f"{where}, run {number},")
    kind = "run" if run.finished else "unfinished run"
    return Found(blocks, f"SLEB's {kind} {number} of {len(runs)}")


def _llm_drop(value: Mapping[str, Any], where: str, num_blocks: int) -> Found:
    """LLM-Drop's blocks, in the order of ``drop_attn_list``.

    Both lists are in order of removal. LLM-Drop writes the same list twice for whole blocks, so
    where the orders differ neither is more right; one of truth values has none.
    """
    key = "num_hidden_layers"
    if value.get(key) is not None:
        _check_count(value[key], num_blocks, where, key)
    (attention, ordered), (mlp, _) = (
        _dropped(value.get(key), f"{where}: {key}", num_blocks)
        for key in ("drop_attn_list", "drop_mlp_list")
    )
    halves = [
        f"only the {half} of block {', '.join(map(str, sorted(blocks)))}"
        for half, blocks in (
            ("attention", set(attention) - set(mlp)),
            ("MLP", set(mlp) - set(attention)),
        )
        if blocks
    ]
    if halves:
        raise SlebError(
            f"{where} drops {' and '.join(halves)}; whole blocks can be removed, halves cannot"
        )
    return Found(attention if ordered else mlp, "LLM-Drop's config")


def _dropped(value: object, where: str, num_blocks: int) -> tuple[tuple[int, ...], bool]:
    """Block numbers, and whether they are in order: LLM-Drop also writes a truth value a block."""
    if value is None:
        return (), True
    if isinstance(value, list) and value and all(isinstance(entry, bool) for entry in value):
        _check_count(len(value), num_blocks, where, "its length")
        return tuple(block for block, dropped in enumerate(value) if dropped), False
    return _numbers(value, where), True


def _mergekit(value: Mapping[str, Any], where: str, num_blocks: int) -> Found:
    if value.get("merge_method", "passthrough") != "passthrough":
        raise SlebError(f"{where} merges models; only merge_method: passthrough removes blocks")
    _check_known(value, _MERGEKIT_TOP, where)
    _check_parameters(value.get("parameters"), where)
    slices = value.get("slices")
    if not isinstance(slices, list) or not slices:
        raise SlebError(f"{where} has no list of slices; without them no blocks are removed")
    kept: list[int] = []
    models = set() if value.get("base_model") is None else {_model(value["base_model"], where)}
    for i, entry in enumerate(slices):
        place = f"{where}: slices[{i}]"
        sources = entry.get("sources") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
            raise SlebError(f"{place} must have one source; several are merged, not removed")
        source = sources[0]
        _check_known(entry, {"sources", "parameters", "base_model"}, place)
        _check_known(source, {"model", "layer_range", "parameters"}, f"{place}.sources[0]")
        for part in (entry, source):
            _check_parameters(part.get("parameters"), place)
        models.add(_model(source.get("model"), place))
        if entry.get("base_model") is not None:
            models.add(_model(entry["base_model"], place))
        limits = _numbers(source.get("layer_range"), f"{place}: layer_range")
        if len(limits) != 2 or not 0 <= limits[0] <= limits[1] <= num_blocks:
            raise SlebError(
                f"{place}: layer_range {list(limits[:3])} does not lie within the model's "
                f"{num_blocks} blocks"
            )
        kept += range(*limits)
    if len(models) > 1:
        raise SlebError(f"{where} takes blocks of several models; one model's can be removed")
    if any(after <= before for before, after in pairwise(kept)):
        raise SlebError(f"{where} repeats or moves blocks; only removals can be imported")
    return Found(tuple(i for i in range(num_blocks) if i not in set(kept)), "mergekit's slices")


def _check_known(value: Mapping[Any, Any], known: set[str], where: str) -> None:
    unknown = next((key for key in value if key not in known and value[key] is not None), None)
    if unknown is not None:
        raise SlebError(
            f"{where} has {_name(unknown)}, which is not known here; remove it if it "
            f"changes no weights"
        )


def _check_parameters(value: object, where: str) -> None:
    if value is None or value == {}:
        return
    if not isinstance(value, dict):
        raise SlebError(f"{where}: parameters is not an object; correct it or remove it")
    name = next((name for name in value if name not in _MERGEKIT_IGNORED), None)
    if name is not None:
        raise SlebError(
            f"{where} has parameters ({_name(name)}), which change weights; only removals can be "
            f"imported"
        )


def _name(key: object) -> str:
    return strict_json.short(key) if isinstance(key, str) else "a key that is no text"


def _model(value: object, where: str) -> str:
    """A mergekit model reference as a text, if it is a plain model."""
    if isinstance(value, dict):
        if value.get("lora") is not None or value.get("adapter") is not None:
            raise _adapter(where)
        _check_known(value, {"model", "path", "revision", "lora", "adapter"}, f"{where}: model")
        path = value.get("model", value)
        if isinstance(path, dict):
            if path is not value:
                _check_known(path, {"path", "revision"}, f"{where}: model")
            value, revision = path.get("path"), path.get("revision")
            if isinstance(value, str) and isinstance(revision, str):
                value = f"{value}@{revision}"
        else:
            value = path
    if not isinstance(value, str) or not value:
        raise SlebError(f"{where} names no model; give one as mergekit does, model: owner/name")
    if "+" in value:
        raise _adapter(where)
    return value


def _adapter(where: str) -> SlebError:
    return SlebError(
        f"{where} merges an adapter into the model; merge it first, and import the slices with the "
        f"merged model"
    )


def _plain(key: object) -> str:
    return str(key).lower().replace(" ", "_").replace("-", "_")


def _listed(value: Mapping[Any, Any], where: str, num_blocks: int) -> Found:
    """A list under a usual name; what else the object says of blocks must agree with it."""
    named = {_plain(key): entry for key, entry in value.items()}
    _check_keys((_plain(key) for key in value), where)
    there = [key for key in named if key in _REMOVED_KEYS and named[key] is not None]
    lists = {
        key: _numbers(named[key], f"{where}: {key}")
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
            raise SlebError(f"{where}: {kept} says what stays; give the removed blocks as a list")
        raise _unknown(where)
    # A list in ascending order may be a sorted copy of one in order of removal.
    orders = {blocks for blocks in lists.values() if list(blocks) != sorted(blocks)}
    blocks = next(iter(orders or lists.values()))
    if len(orders) > 1 or any(sorted(other) != sorted(blocks) for other in lists.values()):
        raise SlebError(f"{where}: {' and '.join(lists)} disagree; give the list that is meant")
    for key, entry in named.items():
        if key in _KEPT_KEYS and isinstance(entry, list):
            stays = _numbers(entry, f"{where}: {key}")
            if sorted((*stays, *blocks)) != list(range(num_blocks)):
                raise SlebError(
                    f"{where}: {key} and {next(iter(lists))} are not the {num_blocks} blocks of "
                    f"this model; give that model, or the list alone"
                )
        after = num_blocks - len(blocks)
        if key in _DENSE_COUNT_KEYS or (key in _EITHER_COUNT_KEYS and entry != after):
            _check_count(entry, num_blocks, where, key)
    return Found(blocks, "list")
