"""The demo: select, show, serve both models, query both, measure both."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from sleb_bench.demo_model import demo_model
from sleb_bench.server import Server, free_port
from sleb_serve.errors import SlebError
from sleb_serve.serving.command import server_command

QUESTION = "What is the capital of France? Answer in one sentence."
_REMOVE = "6"
_SERVER_OPTIONS = ["--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1"]


def main() -> int:
    """Run the demo; return 0 if every part worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the demo model)")
    parser.add_argument(
        "--minutes", type=float, default=1.5, help="to measure, at most (default: 1.5)"
    )
    options = parser.parse_args()
    # By default vLLM's CPU backend takes half of the memory, but two engines run side by side.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if options.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    try:
        _demo(options.folder, options.model, options.minutes)
    except SlebError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    _say(f"done in {time.monotonic() - start:.0f} s")
    return 0


def _demo(folder: Path, model: str | None, minutes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _say("1. the model")
    model = model or str(demo_model(folder))
    print(model)

    _say(f"2. select {_REMOVE} blocks to remove, calibrated on text that comes with Python")
    manifest = str(folder / "manifest.json")
    search = ("select", model, "-o", manifest, "--remove", _REMOVE, "--calibration", "python-docs")
    sequences = ("--sequences", "4", "--sequence-length", "256")
    try:
        _sleb_serve(*search, *sequences, "--resume")
    except SlebError:
        print("the search of an earlier demo cannot be resumed; starting again")
        _sleb_serve(*search, *sequences)

    dtype = _dtype()
    _say("3. serve the pruned and the dense model, ask both the same")
    _ask_both(folder, model, manifest, dtype)

    _say(f"4. measure both, by turns, for {minutes:g} minutes at most")
    _sleb_serve(
        *("bench", model, "-m", manifest, "-o", str(folder / "bench")),
        *("--minutes", f"{minutes:g}", "--starts", "2"),
        *("--engine-args", json.dumps({"enforce_eager": True, "dtype": dtype})),
    )


def _dtype() -> str:
    """Return float32 on a CPU that would emulate bfloat16 at a tenth of the speed."""
    from sleb_serve.models.loading import has_fast

    return "auto" if has_fast("bfloat16") else "float32"


def _ask_both(folder: Path, model: str, manifest: str, dtype: str) -> None:
    import openai

    with ExitStack() as stack:
        servers = {}
        for name in ("pruned", "dense"):
            port = free_port()
            options = [*_SERVER_OPTIONS, "--dtype", dtype, "--port", str(port)]
            command = (
                [*_command(), "serve", model, "-m", manifest, *options]
                if name == "pruned"
                else server_command(model, options)
            )
            print(f"$ {shlex.join(command)}")
            servers[name] = Server(command, port, folder / f"serve-{name}.log")
            stack.callback(servers[name].stop)
        for name, server in servers.items():
            server.wait()
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            served = client.models.list().data[0].id
            answer = client.chat.completions.create(
                model=served,
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=40,
                temperature=0,
            )
            print(f"\n{name} ({served})\n  Q: {QUESTION}\n  A: {answer.choices[0].message.content}")


def _command() -> list[str]:
    return [sys.executable, "-m", "sleb_serve.cli"]


def _sleb_serve(*arguments: str) -> None:
    print(f"$ sleb-serve {shlex.join(arguments)}", flush=True)
    code = subprocess.run([*_command(), *arguments], check=False).returncode
    if code:
        raise SlebError(f"sleb-serve {arguments[0]} ended with exit code {code}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
