"""Check that the model with fewer layers equals the dense one with the blocks skipped.

The tables of config keys (`sleb_serve.cut.config`) cannot cover everything. So both models are
built in Transformers on the meta device, which costs no memory, and compared: each kept layer must
have the same class, plain attributes (except its number) and weight shapes. Any difference is
refused by name.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.decoder import COUNT_KEYS, count_of
from sleb_serve.compat.architectures import check_known
from sleb_serve.cut.config import Cut
from sleb_serve.cut.errors import INSTEAD
from sleb_serve.cut.fed import check_entries, cut_entries
from sleb_serve.cut.keys import BY_LAYER, FROM_ONE, LAST_LAYERS, SLICED
from sleb_serve.cut.layers import decoder_of, layers_path, meta_model
from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils.extras import COMPARES, install_hint, missing

_COUNT = re.compile(r"\b(num_hidden_layers|num_layers)\b")
_OF_SHARING = frozenset(("store_full_length_kv",))
"""Attributes that matter only if layers use other layers' keys and values."""


def transformers_config(model: str | Path, **options: Any) -> Any:
    """Load a model's Transformers config; None if Transformers does not know the model.

    Also None if Transformers is not installed; see `not_compared`.

    Args:
        model: folder or hub id.
        options: options of ``AutoConfig.from_pretrained``, such as ``revision``.

    Raises:
        SlebError: Transformers refuses the type of an entry.
    """
    if missing("transformers"):
        return None
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(str(model), **options)
        found.to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None
    except Exception as error:
        # A config's own code may raise anything for unexpected values.
        raise SlebError(
            f"Transformers cannot read the config of {model}: {first_line(error)}; download the "
            f"model again"
        ) from error
    return found


def not_compared() -> str:
    """Explain why `check_likeness` did not compare the kept layers, and the remedy."""
    lacks = missing(*COMPARES)
    if lacks is None:
        return "Transformers does not know the model, so they were not compared with the dense"
    return f"not compared with the dense model's without {lacks}: {install_hint(lacks)}"


def compared(dense: Any, short: Any, architecture: str, cut: Cut) -> bool:
    """Like `check_likeness`; if nothing can be compared, the architecture must be listed.

    Args:
        dense: the dense model's Transformers config, or None.
        short: the shorter model's Transformers config.
        architecture: the model's architecture name.
        cut: the removed layers.

    Raises:
        SlebError: see `check_likeness` and `check_known`.
    """
    found = dense is not None and check_likeness(dense, short, architecture, cut)
    if not found:
        check_known(architecture)
    return found


def apply(config: Any, cut: Cut) -> dict[str, Any]:
    """Turn a Transformers config into the shorter model's.

    Args:
        config: changed in place.
        cut: the removed layers.

    Returns:
        The original values of the changed entries, by name.

    Raises:
        SlebError: the config cannot express it; the message names the key.
    """
    before: dict[str, Any] = {}
    whole = config.to_dict()
    check_entries(whole, cut)
    for key, value in cut_entries(whole, cut).items():
        setattr(config, key, value)
    decoder = decoder_of(config)
    for part in (decoder,) if decoder is config else (decoder, config):
        values = {
            key: value
            for key, value in part.to_dict().items()
            if not isinstance(value, Mapping) or key in BY_LAYER or key in FROM_ONE
        }
        if count_of(values) != cut.num_blocks:
            if part is decoder:
                raise SlebError(
                    f"the config counts {count_of(values)} layers and the manifest is for "
                    f"{cut.num_blocks}; select again for this model"
                )
            continue
        new = cut.values(values)
        # Set the count first, because other values are validated against it.
        for key in sorted(new, key=lambda key: key not in COUNT_KEYS):
            if new[key] != values.get(key):
                if part is decoder:
                    before[key] = values.get(key)
                setattr(part, key, new[key])
    return before


def check_likeness(dense: Any, short: Any, architecture: str, cut: Cut) -> bool:
    """Compare the model of a cut config with the dense one, layer by layer.

    Args:
        dense: the dense model's Transformers config.
        short: the shorter model's Transformers config.
        architecture: the model's class in Transformers.
        cut: the removed layers.

    Returns:
        False if nothing could be compared because Transformers has no such class, cannot build the
        dense model, or torch is not installed.

    Raises:
        SlebError: a kept layer would differ from the dense model's; the message names the
            attribute.
    """
    if missing("torch"):
        return False
    import transformers

    kind = getattr(transformers, architecture, None)
    if kind is None:
        return False
    try:
        whole = meta_model(kind, dense)
        path = layers_path(whole)
    except Exception:
        # The model's own code fails, which is not the cut's fault.
        return False
    try:
        pruned = meta_model(kind, short)
        layers, left = whole.get_submodule(path), pruned.get_submodule(path)
    except Exception as error:
        raise SlebError(
            f"{architecture} cannot be built without blocks {list(cut.removed)}: "
            f"{first_line(error)}; {INSTEAD}"
        ) from error
    if len(left) != len(cut.kept):
        raise SlebError(f"{architecture} has {len(left)} layers where {len(cut.kept)} stay")
    shares = any(getattr(decoder_of(dense), key, None) for key in LAST_LAYERS)
    for new, old in enumerate(cut.kept):
        for name, why in _differences(layers[old], left[new], cut, shares):
            raise SlebError(
                f"{architecture} without blocks {list(cut.removed)} would have another layer "
                f"{old}: {name} {why}; {INSTEAD}"
            )
    for name, why in _outside(whole, pruned, layers, left):
        raise SlebError(
            f"{architecture} without blocks {list(cut.removed)} differs outside its layers: "
            f"{name} {why}; {INSTEAD}"
        )
    return True


def check_alike(one: Any, other: Any, architecture: str) -> None:
    """Refuse a model with different layer types or shapes than another model.

    Args:
        one: Transformers config of a model.
        other: config of the model, which may differ only in its weights.
        architecture: the Transformers class of both.

    Raises:
        SlebError: names the layer's attribute; or Transformers cannot build one of the models.
    """
    import transformers

    kind = getattr(transformers, architecture, None)
    try:
        first, second = meta_model(kind, one), meta_model(kind, other)
        path = layers_path(first)
        layers, others = first.get_submodule(path), second.get_submodule(path)
    except Exception as error:
        raise SlebError(
            f"Transformers cannot build {architecture} to compare them: {first_line(error)}"
        ) from error
    whole = Cut(len(layers), ())
    shares = any(getattr(decoder_of(one), key, None) for key in LAST_LAYERS)
    for index in range(len(layers)):
        for name, why in _differences(layers[index], others[index], whole, shares):
            raise SlebError(f"in layer {index}, {name} {why}")
    for name, why in _outside(first, second, layers, others):
        raise SlebError(f"outside the layers, {name} {why}")


def _differences(layer: Any, other: Any, cut: Cut, shares: bool) -> Iterator[tuple[str, str]]:
    modules, others = dict(layer.named_modules()), dict(other.named_modules())
    for name in modules.keys() ^ others.keys():
        yield name, "is in one of them alone"
    for name in sorted(modules.keys() & others.keys()):
        one, two = modules[name], others[name]
        dot = f"{name}." if name else ""
        if type(one) is not type(two):
            yield name or "it", f"is {type(one).__name__} there and {type(two).__name__} here"
        for key, value in sorted(vars(one).items()):
            if key.startswith("_") or key == "training" or not _is_plain(value):
                continue
            if key in _OF_SHARING and not shares:
                continue
            if not _same(value, vars(two).get(key), cut):
                yield f"{dot}{key}", f"is {value!r} there and {vars(two).get(key)!r} here"
        yield from _shapes(one, two, dot)
        for method in _methods(type(one)):
            if _counts(method):
                yield (
                    f"{dot}{method.__name__}",
                    f"of {type(one).__name__} computes with the number of layers",
                )


def _shapes(one: Any, two: Any, dot: str) -> Iterator[tuple[str, str]]:
    for kind in ("named_parameters", "named_buffers"):
        shapes, others = (
            {n: tuple(t.shape) for n, t in getattr(m, kind)(recurse=False)} for m in (one, two)
        )
        for name in sorted(shapes.keys() | others.keys()):
            if shapes.get(name) != others.get(name):
                yield f"{dot}{name}", f"is {shapes.get(name)} there and {others.get(name)} here"


def _outside(whole: Any, pruned: Any, layers: Any, left: Any) -> Iterator[tuple[str, str]]:
    def modules(model: Any, inside: Any) -> dict[str, Any]:
        own = {id(module) for module in inside.modules()}
        return {n: m for n, m in model.named_modules() if id(m) not in own}

    ours, theirs = modules(whole, layers), modules(pruned, left)
    for name in sorted(ours.keys() & theirs.keys()):
        if name.rpartition(".")[2] not in SLICED:
            yield from _shapes(ours[name], theirs[name], f"{name}." if name else "")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)


def _same(value: Any, other: Any, cut: Cut) -> bool:
    """Return whether attributes are equal, or are the old and the new number of a layer."""
    if isinstance(value, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(value) == len(other)
            and all(_same(a, b, cut) for a, b in zip(value, other, strict=True))
        )
    if type(value) is not type(other):
        return False
    if isinstance(value, float):
        return math.isclose(value, other, rel_tol=1e-6) or value == other
    if isinstance(value, int) and not isinstance(value, bool):
        return bool(value == other or cut.place(value) == other)
    return bool(value == other)


def _methods(kind: type) -> Iterator[Any]:
    """Return the code of a module's class and its bases, except torch's own."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and name != "__init__" and name not in seen:
                yield method
            seen.add(name)


@functools.cache
def _counts(method: Any) -> bool:
    try:
        return _COUNT.search(inspect.getsource(method)) is not None
    except (OSError, TypeError):
        return False
