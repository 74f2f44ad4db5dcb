"""Checkpoints with one broken file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.decoder import COUNT_KEYS
from sleb_serve.cut import keys

WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        1.5,
        10**18,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "x",
        "x" * 5000,
        "9" * 5000,
    ),
    *("\x1b[2J\x07\x00", "\ud800", "../x", [], [None], [True], ["x"], [-1, 1.5], [[]]),
    *({}, {"x": None}, {"\x1b[2J": 1}, {"0": 0}, [0] * 1000),
)
"""Values of every kind for places of another kind."""

BYTES: tuple[bytes, ...] = (
    *(b"", b"{", b"null", b"[]", b"3", b'"x"', b"NaN", b"\xff\xfe{", b"\x00" * 9, b"9" * 5000),
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"{} {}", b" " * 1_000_000),
    *(b'{"a": 1' + b"0" * 100_000 + b"}", b'{"\\ud800": 1}', b"{" + b'"a":1,' * 100_000),
)
"""Files that are not a JSON object, or that readers interpret differently."""


def copy_with(model: Path, folder: Path, name: str, content: bytes) -> Path:
    """A checkpoint with one replaced file and links to the others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != name:
            os.link(file, folder / file.name)
    (folder / name).write_bytes(content)
    return folder


def spelled(value: Any) -> bytes:
    """JSON with Python's spelling of values that JSON lacks."""
    return json.dumps(value).encode()


def config_cases(config: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Broken contents of config.json."""
    for number, content in enumerate(BYTES):
        yield f"bytes {number}", content
    known = {
        *config,
        *COUNT_KEYS,
        *("architectures", "quantization_config", "text_config", "num_kv_shared_layers", "sleb"),
        *("decoder_sparse_step", "mlp_only_layers", "index_topk_freq", "layers_block_type"),
        *("max_position_embeddings", "torch_dtype", "vocab_size", "auto_map", "rope_scaling"),
        *keys.FIRST_LAYERS,
        *keys.LAST_LAYERS,
        *keys.LAYER_NUMBERS,
        *keys.BY_LAYER,
        *keys.FROM_ONE,
        *keys.EVERY_NTH,
        *keys.NUMBERED,
        *keys.PER_LAYER,
        *keys.LAYER_LETTERS,
        *keys.REPEATED,
        *(keys.LAST_EXPERT, keys.SCALED),
    }
    for key in sorted(known):
        for number, value in enumerate(WRONG):
            yield f"{key} {number}", spelled({**config, key: value})
    for number, value in enumerate(WRONG):
        yield f"a key {number}", spelled({**config, str(value): value})
        for key in ("ignore", "modules_to_not_convert", "dynamic", "quant_method"):
            quantisation = {"quant_method": "gptq", "bits": 4, key: value}
            yield f"{key} {number}", spelled({**config, "quantization_config": quantisation})
    without = {key: value for key, value in config.items() if key != "architectures"}
    yield "no architecture", spelled(without)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def weight_cases(file: Path) -> Iterator[tuple[str, bytes]]:
    """Broken contents of model.safetensors."""
    header, data = header_of(file)
    names = [name for name in header if name != "__metadata__"]
    for number, content in enumerate(BYTES):
        yield f"bytes {number}", content
        yield f"header {number}", with_header(content, data)
    for length in (0, 1, 7, len(data), 100 << 20, 1 << 40, (1 << 64) - 1):
        yield f"length {length}", with_header(spelled(header), data, length)
    yield "cut short", with_header(spelled(header), data[:-1])
    yield "longer", with_header(spelled(header), data + b"\x00" * 8)
    name = next(name for name in names if ".1." in name)
    entry = header[name]
    begin, end = entry["data_offsets"]
    for number, value in enumerate(WRONG):
        for key in entry:
            changed = {**header, name: {**entry, key: value}}
            yield f"{key} {number}", with_header(spelled(changed), data)
        for key in ("shape", "data_offsets"):
            changed = {**header, name: {**entry, key: [value, *entry[key][1:]]}}
            yield f"{key}[0] {number}", with_header(spelled(changed), data)
        yield f"entry {number}", with_header(spelled({**header, name: value}), data)
        yield f"metadata {number}", with_header(spelled({**header, "__metadata__": value}), data)
        renamed = {(str(value) if key == name else key): e for key, e in header.items()}
        yield f"name {number}", with_header(spelled(renamed), data)
        numbered = {str(i) + str(value): header[key] for i, key in enumerate(names)}
        yield f"digits {number}", with_header(spelled(numbered), data)
    for number, offsets in enumerate(
        ([end, begin], [begin - 1, end], [begin, end + 1], [0, 1 << 62], [-1, 3], [begin], [0] * 3)
    ):
        changed = {**header, name: {**entry, "data_offsets": offsets}}
        yield f"offsets {number}", with_header(spelled(changed), data)
    for key in entry:
        left = {k: v for k, v in entry.items() if k != key}
        yield f"no {key}", with_header(spelled({**header, name: left}), data)
    yield "digits", with_header(spelled({str(i): header[key] for i, key in enumerate(names)}), data)
    yield "one long", with_header(spelled({**header, "9" * 5000: entry}), data)


def index_cases(file: Path) -> Iterator[tuple[str, bytes]]:
    """Broken contents of model.safetensors.index.json, which stands in place of the one file."""
    header, _ = header_of(file)
    names = [name for name in header if name != "__metadata__"]
    places = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    yield "honest", spelled({"weight_map": places})
    for number, content in enumerate(BYTES):
        yield f"bytes {number}", content
    more = ("a\x00b", "\x1b[2J", "/dev/zero", "..", "../a", "a/b", ".", "model.safetensors\n")
    for number, value in enumerate((*WRONG, *more)):
        yield f"map {number}", spelled({"weight_map": value})
        yield f"place {number}", spelled({"weight_map": {**places, names[0]: value}})
        yield f"places {number}", spelled({"weight_map": dict.fromkeys(names, value)})
        yield f"name {number}", spelled({"weight_map": {**places, str(value): places[names[0]]}})
        yield f"metadata {number}", spelled({"metadata": value, "weight_map": places})
        yield (
            f"digits {number}",
            spelled({"weight_map": {str(i) + str(value): "x" for i in range(4)}}),
        )
