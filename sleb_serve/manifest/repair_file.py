"""The sidecar of a repaired manifest: a safetensors file with the weights that repair its gaps.

Its tensors have the names and shapes of the checkpoint's, in whose place they are loaded. The
manifest names the file and its SHA-256, and lies beside it.
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

_CHUNK = 1 << 24


def sidecar_path(output: Path) -> Path:
    """Where the sidecar of the manifest `output` lies."""
    return output.with_name(f"{output.name}.repair.safetensors")


def write_sidecar(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Write a sidecar, whole or not at all.

    Args:
        path: where.
        tensors: torch tensors by name.
        about: what they belong to, for people who find the file alone.

    Returns:
        The file's SHA-256.

    Raises:
        SlebError: it cannot be written; what was there before still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        try:
            # One entry of metadata: several would be written in no fixed order.
            save_file(dict(tensors), temporary, metadata={"sleb_serve": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error
        return _sha256(temporary)


def check_sidecar(repair: RepairFile) -> None:
    """Refuse a sidecar that is not the one that the manifest names.

    Raises:
        SlebError: it is missing, cut short, or another's.
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
            f"found {found[:16]}…; it was cut short or is another manifest's: copy it again"
        )


def read_sidecar(pruning: Pruning) -> dict[str, Any]:
    """The tensors that repair a pruning, on the CPU; none if it is not repaired.

    Raises:
        SlebError: as `check_sidecar`.
    """
    if pruning.repair is None:
        return {}
    from safetensors.torch import load_file

    check_sidecar(pruning.repair)
    tensors: dict[str, Any] = load_file(pruning.repair.path)
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
