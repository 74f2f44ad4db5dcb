"""Record the fingerprints of the symbols in the plugin's ledger, of one tested version of vLLM.

Usage: vllm_fingerprints.py VERSION [FOLDER]   FOLDER is the package vllm, unpacked; by default the
one that is installed.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from sleb_serve.compat.vllm_versions import LEDGER, fingerprints, ledger


def main(version: str, folder: str | None = None) -> None:
    if folder is None:
        spec = find_spec("vllm")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = spec.submodule_search_locations[0]
    found = ledger()
    found["fingerprints"][version] = fingerprints(Path(folder))
    found["fingerprints"] = dict(
        sorted(found["fingerprints"].items(), key=lambda item: int(item[0].partition(".")[2]))
    )
    LEDGER.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
