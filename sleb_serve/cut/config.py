"""Config and tensor names of the pruned model, an ordinary model with fewer layers.

Serving, export, drafts, selection and evaluation all use this module. It works on plain JSON values
without torch or Transformers; `sleb_serve.cut.likeness` compares the result with the dense model,
layer by layer.

Configs describe layers in a few forms: one value per layer (a list, a string, a dict by layer
number), a list of layer numbers, the number of first or last layers of a type, or every nth layer.
The last form cannot describe fewer layers, so Transformers' own derivation is first made explicit
(see `explicit`); if that is impossible, the cut is refused and the key named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb_serve.checkpoint.decoder import (
    COUNT_KEYS,
    number_after,
)
from sleb_serve.cut.errors import INSTEAD, read_as_layers
from sleb_serve.cut.keys import (
    BY_LAYER,
    EVERY_NTH,
    FIRST_LAYERS,
    FROM_ONE,
    LAST_EXPERT,
    LAST_LAYERS,
    LAYER_LETTERS,
    LAYER_NUMBERS,
    NOT_PER_LAYER,
    NUMBERED,
    PER_LAYER,
    REPEATED,
    SCALED,
    SLICED,
)
from sleb_serve.errors import SlebError


@dataclass(frozen=True)
class Cut:
    """A decoder of `num_blocks` layers and the removed ones; kept layers get new numbers."""

    num_blocks: int
    removed: tuple[int, ...]

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Return the kept blocks by their number in the dense model."""
        gone = set(self.removed)
        return tuple(index for index in range(self.num_blocks) if index not in gone)

    @cached_property
    def places(self) -> dict[int, int]:
        """Return the new number of each kept block."""
        return {old: new for new, old in enumerate(self.kept)}

    def place(self, block: int) -> int | None:
        """Return the new number of a block; None if it is removed.

        Layers after the last one, for multi-token prediction, follow the last kept layer.
        """
        if block >= self.num_blocks:
            return block - len(self.removed)
        return self.places.get(block)

    def name(self, name: str, prefix: str) -> str | None:
        """Return the new name of a tensor or module of the dense model; None if it is removed.

        Args:
            name: name in the checkpoint.
            prefix: prefix of the decoder's layer numbers, from `decoder_prefix`.
        """
        block = number_after(name, prefix)
        if block is None:
            return name
        place = self.place(block)
        rest = name[len(prefix) + len(str(block)) :]
        return None if place is None else f"{prefix}{place}{rest}"

    def parts(self, name: str, shape: Sequence[int]) -> int | None:
        """Return the dimension along which a tensor has one part per layer."""
        module = name.split(".")[-2:-1]
        dimension = SLICED.get(module[0]) if module else None
        if dimension is None or dimension >= len(shape) or shape[dimension] % self.num_blocks:
            return None
        return dimension

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Cut a decoder's config to the kept layers.

        Args:
            values: the config's entries, without nested configs.

        Raises:
            SlebError: an entry cannot be expressed for fewer layers or is unknown; the message
                names the key.
        """
        self._check_sharing(values)
        said = {**self._sparse_step(values), **self._indexers(values)}
        cut = {**values, **said}
        for key, value in values.items():
            if key not in said:
                with read_as_layers(key, value):
                    cut[key] = self._value(key, value, values)
        return cut

    def _value(self, key: str, value: Any, values: Mapping[str, Any]) -> Any:
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
        if key in COUNT_KEYS and number == self.num_blocks:
            return len(self.kept)
        if key == SCALED and isinstance(value, int | float) and value:
            return value * math.sqrt(len(self.kept) / self.num_blocks)
        if key in FIRST_LAYERS or key == LAST_EXPERT:
            return self._bound(key, value)
        if key in LAYER_NUMBERS:
            return self._numbers(key, value)
        if key in FROM_ONE and isinstance(value, Mapping):
            return {
                name: [n + 1 for n in self._numbers(name, [number - 1 for number in numbers])]
                if name in FROM_ONE[key] and numbers is not None
                else numbers
                for name, numbers in value.items()
            }
        if key in LAST_LAYERS and number:
            return sum(index >= self.num_blocks - number for index in self.kept)
        if key in REPEATED and isinstance(value, list) and value:
            return [value[index % len(value)] for index in self.kept]
        if key in BY_LAYER and isinstance(value, Mapping):
            return {
                str(self.places[int(index)]): entry
                for index, entry in value.items()
                if int(index) in self.places
            }
        if key in EVERY_NTH and number is not None and number > 1:
            self._check_period(key, number, values)
        if key in NUMBERED and value:
            raise SlebError(
                f"{key}: layers use their own number, which changes when earlier layers are "
                f"removed; {INSTEAD}"
            )
        if key in LAYER_LETTERS and isinstance(value, str) and len(value) >= self.num_blocks:
            return "".join(self._each(value))
        if key in PER_LAYER and isinstance(value, list) and len(value) >= self.num_blocks > 1:
            return self._each(value)
        listed = isinstance(value, list) and len(value) == self.num_blocks > 1
        if listed and key not in NOT_PER_LAYER:
            raise SlebError(
                f"{key} lists {len(value)} values, probably one per layer, and this version does "
                f"not know the key; {INSTEAD}"
            )
        return value

    def _each(self, value: Sequence[Any]) -> list[Any]:
        """Return the values of the kept layers and of those after the last."""
        return [*(value[index] for index in self.kept), *value[self.num_blocks :]]

    def _numbers(self, key: str, value: Any) -> Any:
        """Parse layer numbers from a list or a string; an empty string belongs to another model."""
        if isinstance(value, list):
            if any(not isinstance(i, int) or isinstance(i, bool) for i in value):
                raise ValueError(key)
            return [place for i in value if (place := self.place(i)) is not None]
        if not isinstance(value, str):
            return value
        places = [self.place(int(part)) for part in value.strip().split(",")]
        left = [str(place) for place in places if place is not None]
        if not left:
            raise SlebError(f"{key}: no layer that it names is kept; {INSTEAD}")
        return ",".join(left)

    def _bound(self, key: str, value: Any) -> Any:
        """Cut the number up to, or from, which layers have a type, or several such numbers."""
        if isinstance(value, list):
            return [self._bound(key, entry) for entry in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if key == LAST_EXPERT and value < 0:
            return value
        if key == LAST_EXPERT:
            # Not negative, which would count from the end.
            if self.kept[0] > value:
                raise SlebError(f"{key}: no layer up to {value} is kept; {INSTEAD}")
            return sum(index <= value for index in self.kept) - 1
        return sum(index < value for index in self.kept)

    def _check_period(self, key: str, period: int, values: Mapping[str, Any]) -> None:
        explicit = values.get(EVERY_NTH[key] or "")
        if isinstance(explicit, list) and explicit:
            return
        for old, new in self.places.items():
            if (old - new) % period:
                raise SlebError(
                    f"{key} makes every {period}th layer another kind, which cannot be expressed "
                    f"once layer {old} is number {new}; {INSTEAD}"
                )

    def _sparse_step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Qwen's MoE: every nth layer has experts unless listed; lists all others."""
        step = values.get("decoder_sparse_step")
        if not isinstance(step, int) or step <= 1:
            return {}
        listed = values.get("mlp_only_layers") or []
        with read_as_layers("mlp_only_layers", listed):
            plain = [i for i in self.kept if i in listed or (i + 1) % step]
        return {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [self.places[index] for index in plain],
        }

    def _indexers(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """DeepSeek's sparse attention: every nth layer has an indexer; lists them explicitly."""
        period = values.get("index_topk_freq")
        if not isinstance(period, int) or period <= 1 or values.get("index_topk_pattern"):
            return {}
        first = values.get("index_skip_topk_offset", 2)
        shares = [max(index - first + 1, 0) % period for index in self.kept]
        return {"index_topk_pattern": "".join("S" if share else "F" for share in shares)}

    def _check_sharing(self, values: Mapping[str, Any]) -> None:
        lost = sorted(set(self.removed) & self.needed(values))
        if lost:
            raise SlebError(
                f"block {lost[0]} holds the keys and values that later blocks use "
                f"(num_kv_shared_layers), so it cannot be removed without them; {INSTEAD}"
            )

    def needed(self, values: Mapping[str, Any]) -> frozenset[int]:
        """Return the blocks that share their keys and values with a kept block."""
        return frozenset(
            source
            for source, users in shared_sources(values, self.num_blocks).items()
            if users & set(self.kept)
        )


def shared_sources(values: Mapping[str, Any], num_blocks: int) -> dict[int, frozenset[int]]:
    """Return the blocks that share keys and values, and their users.

    In Gemma 3n and 4, the last ``num_kv_shared_layers`` blocks use the keys and values of the last
    earlier block with their attention type.
    """
    shared = values.get("num_kv_shared_layers")
    if not isinstance(shared, int) or isinstance(shared, bool) or not 0 < shared < num_blocks:
        return {}
    types = values.get("layer_types")
    if not isinstance(types, list) or len(types) != num_blocks:
        types = [None] * num_blocks
    first = num_blocks - shared
    users: dict[int, set[int]] = {}
    for block in range(first, num_blocks):
        sources = [index for index in range(first) if types[index] == types[block]]
        if sources:
            users.setdefault(sources[-1], set()).add(block)
    return {source: frozenset(blocks) for source, blocks in users.items()}
