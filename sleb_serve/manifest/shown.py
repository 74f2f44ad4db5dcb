"""What a server shows of the manifest that it serves: no path of the machine it runs on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb_serve.manifest.pruning import Pruning


def shown(pruning: Pruning, names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> bytes:
    """The JSON of ``GET /sleb/manifest``, made once: any number of requests costs little."""
    answer = {
        "tag": pruning.tag,
        "digest": pruning.digest,
        "served_model_name": list(names),
        "pruning": pruning.without_path(),
        "ranks": list(reports),
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def shown_name(name: str) -> str:
    """A served model's name; of a folder, which vLLM names a model by, only the last part."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.is_dir()
    return path.resolve().name if is_path else name
