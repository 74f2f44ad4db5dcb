"""The sidecar of a repaired manifest: a safetensors file with the repair's weights.

A tensor with the name of a checkpoint tensor replaces it. ``NAME.lora_A`` [r, inputs] and
``NAME.lora_B`` [outputs, r] are added to the checkpoint's NAME: W + B A, computed in float32 and
rounded to W's dtype. The manifest, in the same folder, has the file's name and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.pruning import Pruning, RepairFile
from sleb_serve.utils.atomic_io import whole_file
from sleb_serve.utils.outputs import Kind

LORA_A, LORA_B = ".lora_A", ".lora_B"
"""Suffixes of a weight's name for the two factors of its update."""
_ABOUT = "sleb_serve"
_CHUNK = 1 << 24
_DTYPES = ("float32", "bfloat16", "float16")


class WeightChanges:
    """The changes in a sidecar.

    Args:
        tensors: the sidecar's tensors.
        where: the sidecar's path, for messages.

    Raises:
        SlebError: one of a weight's two factors is missing.
    """

    def __init__(self, tensors: Mapping[str, Any], where: str = "") -> None:
        self.tensors, self._where = tensors, where
        self.names = frozenset(name.removesuffix(LORA_A).removesuffix(LORA_B) for name in tensors)
        """Return the names of the changed weights, as in the checkpoint."""
        for name in self.names - tensors.keys():
            if not {name + LORA_A, name + LORA_B} <= tensors.keys():
                raise SlebError(f"the repair {where} has one factor of {name} alone; make it again")

    def __call__(self, name: str, weight: Any) -> Any:
        """Apply the repair to a weight; return an unchanged weight as is.

        Args:
            name: as in the checkpoint.
            weight: the whole torch tensor, not a rank's shard.

        Raises:
            SlebError: the repair has a different shape, or the weight is quantised.
        """
        if name in self.tensors:
            return self.tensors[name]
        if name not in self.names:
            return weight
        a, b = (self.tensors[name + end].to(weight.device).float() for end in (LORA_A, LORA_B))
        if (len(b), a.shape[1]) != tuple(weight.shape) or b.shape[1] != len(a):
            raise SlebError(
                f"the repair {self._where} changes {name} as [{len(b)}, {a.shape[1]}], the "
                f"checkpoint has {list(weight.shape)}; heal again"
            )
        if str(weight.dtype).removeprefix("torch.") not in _DTYPES:
            raise SlebError(
                f"the repair {self._where} changes {name}, which is quantised to {weight.dtype}; "
                f"serve the checkpoint that it was made for"
            )
        return (weight.float() + b @ a).to(weight.dtype)


def _is_sidecar(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return _ABOUT in (file.metadata() or {})
    except SafetensorError:
        return False


SIDECAR = Kind("a repair's weights", _is_sidecar)


def sidecar_path(output: Path, blocks: int | None = None) -> Path:
    """Return the path of the sidecar of manifest `output`, or of its first `blocks` removals."""
    part = "" if blocks is None else f"-{blocks}"
    return output.with_name(f"{output.name}.repair{part}.safetensors")


def write_sidecar(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Write a sidecar, completely or not at all.

    Args:
        path: the file to write.
        tensors: torch tensors by name.
        about: a description, for people who find the file on its own.

    Returns:
        The file's SHA-256.

    Raises:
        SlebError: it cannot be written; an existing file is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        try:
            # A single metadata entry, because the order of several would not be fixed.
            save_file(dict(tensors), temporary, metadata={_ABOUT: json.dumps(about)})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error
        return _sha256(temporary)


def check_sidecar(repair: RepairFile) -> None:
    """Refuse a sidecar that does not match the manifest.

    Raises:
        SlebError: it is missing, truncated, or belongs to another manifest.
    """
    path = Path(repair.path)
    try:
        found = _sha256(path)
    except OSError as error:
        raise SlebError(
            f"cannot read the repair {path}: {first_line(error)}; it belongs beside its manifest "
            f"on every machine that serves it: copy it there, or select without `repair`"
        ) from error
    if found != repair.sha256:
        raise SlebError(
            f"the repair {path} is not the manifest's: sha256 expected {repair.sha256[:16]}…, "
            f"found {found[:16]}…; it is incomplete or another manifest's; copy it again"
        )


def read_sidecar(pruning: Pruning) -> WeightChanges:
    """Read the repair of a pruning on the CPU; empty if there is none.

    Raises:
        SlebError: as for `check_sidecar`.
    """
    if pruning.repair is None:
        return WeightChanges({})
    from safetensors.torch import load_file

    check_sidecar(pruning.repair)
    return WeightChanges(load_file(pruning.repair.path), pruning.repair.path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
