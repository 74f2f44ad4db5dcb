"""Run several commands one after another in one process, which a launcher may start.

Usage: several_commands.py FOLDER. The commands are in FOLDER/commands.json; the results go to
FOLDER/results-RANK.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from sleb_serve.cli.main import main


def run(arguments: list[str]) -> dict[str, object]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "error": error.getvalue()}


def run_commands(folder: Path) -> None:
    results = [run(arguments) for arguments in json.loads((folder / "commands.json").read_text())]
    rank = os.environ.get("RANK", "0")
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_commands(Path(sys.argv[1]))
