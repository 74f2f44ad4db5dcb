"""Find architectures with configs that describe all layers and can be cut without Transformers.

Usage: says_all.py   prints the architectures, for "config_says_all" in architectures.json

This package alone cuts each tiny model's config.json, once for every block, and Transformers'
reading of the result is compared with the dense model: unchanged, without layer entries, with a
sliding window, and with only its sizes. If no layer changes in any form, positions do not matter.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matrix import MODELS, MULTIMODAL, Model
from sleb_serve.checkpoint.decoder import at, count_of, decoder_path
from sleb_serve.cut.config import Cut
from sleb_serve.cut.keys import (
    BY_COUNT,
    BY_LAYER,
    EVERY_NTH,
    LAYER_LETTERS,
    LAYER_NUMBERS,
    PER_LAYER,
    REPEATED,
)
from sleb_serve.cut.likeness import check_likeness, transformers_config
from sleb_serve.cut.whole import cut_config
from sleb_serve.errors import SlebError

COUNTS = BY_COUNT | EVERY_NTH.keys()
LISTS = PER_LAYER | LAYER_LETTERS | LAYER_NUMBERS | BY_LAYER | REPEATED
LEAST_FORMS = 3
"""In which a model must have been compared without all of its blocks."""


def loaded(config: Mapping[str, Any]) -> Any:
    """Load a config.json in Transformers; None if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        try:
            return transformers_config(folder)
        except Exception:
            # A form that we made up need not be one that Transformers takes.
            return None


def forms(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and forms of it that leave more to Transformers."""
    yield config
    path = decoder_path(config) or ()
    bare = copy.deepcopy(config)
    values = at(bare, path)
    assert isinstance(values, dict)
    for key in [*values]:
        if key in COUNTS or (key in LISTS and isinstance(values[key], list | str)):
            del values[key]
    yield bare
    sliding = copy.deepcopy(bare)
    at(sliding, path).update(use_sliding_window=True, sliding_window=8)  # type: ignore[union-attr]
    yield sliding
    if not path:
        names = {key: config[key] for key in ("architectures", "model_type")}
        yield names | {key: value for key, value in bare.items() if type(value) is int}


def compared(form: Mapping[str, Any], architecture: str) -> int:
    """How many blocks were removed, each alone, and left all others as they are; -1: one did not.

    Refused cuts are not a problem.
    """
    dense = loaded(form)
    count = count_of(at(form, decoder_path(form) or ()) or {})
    found = 0
    for block in range(count or 0) if dense is not None else ():
        cut = Cut(count or 0, (block,))
        try:
            short = cut_config(form, cut)
        except SlebError:
            continue
        other = loaded(short)
        try:
            if other is None or not check_likeness(dense, other, architecture, cut):
                return -1
        except SlebError:
            return -1
        found += 1
    return found


def says_all(model: Model) -> bool:
    """Whether no layer of a model changes in any form."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        config = json.loads(Path(folder, "config.json").read_text())
    (architecture,) = config["architectures"]
    count = count_of(at(config, decoder_path(config) or ()) or {})
    found = [compared(form, architecture) for form in forms(config)]
    return min(found) >= 0 and sum(number == count for number in found) >= LEAST_FORMS


def architecture_of(model: Model) -> str:
    """What its config.json names."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        return str(json.loads(Path(folder, "config.json").read_text())["architectures"][0])


def measured() -> list[str]:
    """The architectures of which all tiny models say all."""
    found: dict[str, bool] = {}
    for model in MODELS.values():
        if model.kind != MULTIMODAL and model.missing is None:
            name = architecture_of(model)
            found[name] = found.get(name, True) and says_all(model)
    return sorted(name for name, says in found.items() if says)


if __name__ == "__main__":
    json.dump(measured(), sys.stdout, indent=2)
