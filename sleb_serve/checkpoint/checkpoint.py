"""A model's files, its config and its digests.

Needs neither torch nor transformers, so any machine can compare a manifest with a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.checkpoint.decoder import (
    COUNT_KEYS,
    MAX_BLOCKS,
    at,
    count_of,
    decoder_path,
    decoder_prefix,
    number_after,
)
from sleb_serve.checkpoint.files import WEIGHT_FILES, names_in, read_json, weight_map_of
from sleb_serve.checkpoint.full_digest import Reading, Tensor, full_digests, not_told
from sleb_serve.checkpoint.quantisation import QUANTISATION_FILES, QUANTISATION_KEYS
from sleb_serve.checkpoint.safetensors import sample, tensors_of
from sleb_serve.errors import SlebError
from sleb_serve.protocol import CONFIG_KEY
from sleb_serve.utils import strict_json

# Keys of config.json about how it was written or loaded, which do not affect the computation. The
# same weights saved by another version of Transformers must keep their digest.
_NOT_THE_MODEL = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
    | {"use_cache", "architectures_version", CONFIG_KEY}
)
_QUANTISATION = QUANTISATION_KEYS[0]
_NOTHING: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Checkpoint:
    """A model folder with its parsed config.json."""

    path: Path
    config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """Return the first model class in config.json.

        Raises:
            SlebError: there is none.
        """
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise SlebError(
                f"{self.path}/config.json names no architecture; add the model's class under "
                f'"architectures", as Transformers writes it'
            )
        return names[0]

    @property
    def num_blocks(self) -> int:
        """Return the number of decoder blocks in config.json.

        Raises:
            SlebError: it has no such number.
        """
        count = count_of(self.decoder_config)
        if count is None:
            raise SlebError(
                f"{self.path}/config.json does not give the number of layers, 1 to "
                f"{MAX_BLOCKS:,} (looked for {', '.join(COUNT_KEYS)}, also in its text_config); "
                f"give a model with a decoder"
            )
        return count

    @property
    def decoder_config(self) -> Mapping[str, Any]:
        """Return the decoder's config: all of config.json, or a nested config."""
        path = decoder_path(self.config)
        return self.config if path is None else at(self.config, path) or {}

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all tensors; those of missing shards come from the index.

        Raises:
            SlebError: there are no weights, or a file is truncated.
        """
        for single, index in WEIGHT_FILES:
            if (self.path / single).is_file():
                return tuple(names_in(self.path / single))
            if (self.path / index).is_file():
                return tuple(weight_map_of(self.path / index))
        self.weight_files()
        return ()

    @cached_property
    def layer_prefix(self) -> str:
        """Return the prefix of the decoder's layer numbers in tensor names.

        Raises:
            SlebError: the weights have fewer layers than config.json.
        """
        try:
            return decoder_prefix(self.tensor_names, self.num_blocks)
        except SlebError as error:
            raise SlebError(f"{self.path}: {error}") from None

    def check_layers(self) -> None:
        """Refuse weights that do not match config.json's layer count; see `layer_prefix`."""
        _ = self.layer_prefix

    def is_quantised(self) -> bool:
        """Return whether config.json or another file describes a quantisation."""
        inside = (
            c.get(key) for c in (self.config, self.decoder_config) for key in QUANTISATION_KEYS
        )
        return any(isinstance(value, Mapping) for value in inside) or bool(
            self.quantisation_files()
        )

    def quantisation_files(self) -> dict[str, Any]:
        """Return the contents of separate quantisation config files."""
        files = (self.path / name for name in QUANTISATION_FILES)
        return {file.name: read_json(file) for file in files if file.is_file()}

    @property
    def dtype(self) -> str:
        """Return the dtype in config.json; float32 without one, as in Transformers."""
        for config in (self.config, self.decoder_config):
            for key in ("dtype", "torch_dtype"):
                if isinstance(name := config.get(key), str):
                    return name
        return "float32"

    def config_sha256(self) -> str:
        """Return the digest of config.json without the keys about how it was written or loaded."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_THE_MODEL}
        return hashlib.sha256(strict_json.canonical(kept)).hexdigest()

    def weight_files(self, without: frozenset[int] = frozenset()) -> tuple[Path, ...]:
        """Return the weight files, preferring safetensors over PyTorch's, as Transformers does.

        Args:
            without: blocks to skip; shards with only these blocks are omitted and may be missing.

        Raises:
            SlebError: there are none, or the index names a missing file.
        """
        for single, index in WEIGHT_FILES:
            if (self.path / single).is_file():
                return (self.path / single,)
            if (self.path / index).is_file():
                wanted = set(weight_map_of(self.path / index).values()) - self.unneeded_files(
                    without
                )
                files = tuple(self.path / name for name in sorted(wanted))
                missing = next((file for file in files if not file.is_file()), None)
                if missing is not None:
                    raise SlebError(
                        f"{self.path} lacks the checkpoint shard {missing.name} that {index} "
                        f"names; download the model again"
                    )
                return files
        raise SlebError(
            f"{self.path} holds no weights (looked for model.safetensors and pytorch_model.bin, "
            f"whole or with an index); give a complete Transformers checkpoint"
        )

    def unneeded_files(self, without: frozenset[int]) -> frozenset[str]:
        """Return the names of shards, existing or not, with only blocks in `without`."""
        for single, index in WEIGHT_FILES:
            if (self.path / single).is_file():
                break
            if (self.path / index).is_file():
                places = weight_map_of(self.path / index)
                wanted = {f for name, f in places.items() if self.block_of(name) not in without}
                return frozenset(places.values()) - wanted
        return frozenset()

    def block_sha256(self, without: frozenset[int] = frozenset()) -> tuple[str, ...] | None:
        """The digest of each block's weights, and before them that of what lies outside; see
        `weights_sha256`. None for a checkpoint in PyTorch's own format.

        The weights of blocks in `without` are not read; their digests are those of no weights.
        """  # noqa: D205
        parts = self._parts(without)
        if parts is None:
            return None
        digests = [hashlib.sha256() for _ in parts]
        for digest, part in zip(digests, parts, strict=True):
            for name, dtype, shape, start, end, file in part:
                digest.update(strict_json.canonical([name, dtype, shape]))
                with file.open("rb") as stream:
                    sample(stream, start, end, digest.update)
        return tuple(digest.hexdigest() for digest in digests)

    def full_sha256(
        self, without: frozenset[int] = frozenset(), reading: Reading = not_told
    ) -> tuple[str, ...] | None:
        """As `block_sha256`, over all bytes of the tensors; `reading` is told how far it is.

        Raises:
            SlebError: weights are missing, or a file cannot be read or is cut short.
        """
        parts = self._parts(without)
        return None if parts is None else full_digests(parts, reading)

    def _parts(self, without: frozenset[int]) -> list[list[Tensor]] | None:
        """The tensors outside the blocks, then those of each block, by name; none of `without`."""
        files = self.weight_files(without)
        if files[0].suffix != ".safetensors":
            return None
        parts: list[list[Tensor]] = [[] for _ in range(self.num_blocks + 1)]
        tensors = sorted(
            (name, *entry, file) for file in files for name, entry in tensors_of(file).items()
        )
        for tensor in tensors:
            index = self.block_of(tensor[0])
            if index not in without:
                parts[0 if index is None else index + 1].append(tensor)
        return parts

    def weights_sha256(self, known: Mapping[int, str] = _NOTHING) -> str:
        """The quick digest, over every tensor's name, dtype, shape and a sample of its bytes.

        Four chunks of 4 KiB, evenly spaced, are read of each tensor, and small tensors whole: a
        70B model costs a few thousand small reads, and a fine-tuned sibling differs in all of
        them. It is the digest of a list of digests, one for what lies outside the decoder blocks
        and then one per block, each over its tensors by name; so it does not depend on how the
        tensors are spread over shards. A checkpoint in PyTorch's own format is sampled file by
        file instead.

        Args:
            known: digests of blocks that are not to be read. Wrong ones give a wrong result.

        Raises:
            SlebError: weights are missing or a file is cut short.
        """
        leaves = self.block_sha256(frozenset(known))
        if leaves is not None:
            mended = [known.get(i - 1, leaf) for i, leaf in enumerate(leaves)]
            return hashlib.sha256(strict_json.canonical(mended)).hexdigest()
        whole = hashlib.sha256()
        for file in self.weight_files():
            size = file.stat().st_size
            whole.update(strict_json.canonical([file.name, size]))
            with file.open("rb") as stream:
                sample(stream, 0, size, whole.update)
        return whole.hexdigest()

    def tensor_bytes(self, without: frozenset[int]) -> tuple[int, int] | None:
        """Return the bytes of tensors outside the blocks in `without`, and of those inside.

        The latter excludes missing shards with only such blocks. None for a checkpoint in PyTorch's
        own format.
        """
        files = self.weight_files(without)
        if files[0].suffix != ".safetensors":
            return None
        rest = [self.path / name for name in sorted(self.unneeded_files(without))]
        outside = inside = 0
        for file in (*files, *(file for file in rest if file.is_file())):
            for name, (_, _, start, end) in tensors_of(file).items():
                if self.block_of(name) in without:
                    inside += end - start
                else:
                    outside += end - start
        return outside, inside

    def block_of(self, name: str) -> int | None:
        """Return the decoder block of a tensor; None outside the blocks."""
        index = number_after(name, self.layer_prefix)
        return index if index is not None and index < self.num_blocks else None

    def parameter_counts(self) -> tuple[int, list[int]] | None:
        """Count parameters outside the decoder blocks and per block; None for PyTorch's format."""
        files = self.weight_files()
        if files[0].suffix != ".safetensors":
            return None
        outside, counts = 0, [0] * self.num_blocks
        for file in files:
            for name, (_, shape, _, _) in tensors_of(file).items():
                index = self.block_of(name)
                if index is None:
                    outside += math.prod(shape)
                else:
                    counts[index] += math.prod(shape)
        return outside, counts
