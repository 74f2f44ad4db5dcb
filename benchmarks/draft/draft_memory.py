"""Measure the resident memory of a server whose pruned model drafts for its dense self.

Usage: draft_memory.py MODEL FOLDER --removed 5,25,17 [--tokens 3] [--rounds 1]
[--variants dense,copied]. FOLDER gets `memory.jsonl`. Variants: `dense`; `drafted`, as
`--as-draft` serves it; `copied`, whose draft reads a copy of the checkpoint, so that it keeps
weights of its own.

What is counted: the proportional set size (PSS, bytes) of all processes of the server after the
same requests, and the anonymous part of it, which other processes of the machine do not change.
The KV cache, 1 GiB, counts whole in each variant: vLLM fills it with zeros at the start.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from drafting import parser_of, speculation

from sleb_bench.server import Server, free_port
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.serving.client import Client

PROMPTS = ("The capital of France is", "Once upon a time there was a", "Water boils when it")
OPTIONS = ("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512")
_SAID = re.compile(r"draft (?:shares|keeps) .*")


def main() -> None:
    """Start each variant in turn, write the records, print the memory and its ratio."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--variants", type=lambda text: text.split(","), default="dense,drafted")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    first: dict[str, int] = {}
    for index in range(options.rounds):
        for variant in options.variants:
            found = _measure(options, _speculation(options, variant))
            weights = open_checkpoint(options.model).tensor_bytes(frozenset())
            record = {
                "round": index,
                "variant": variant,
                "removed": options.removed,
                "draft_tokens": options.tokens,
                "checkpoint_bytes": weights and weights[0],
                **found,
            }
            with (options.folder / "memory.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            base = first.setdefault(options.variants[0], found["pss"])
            print(
                f"{variant}: {found['pss'] / 1e6:.0f} MB, {found['pss'] / base:.3f} x "
                f"{options.variants[0]}; {found['pss_anonymous'] / 1e6:.0f} MB of it anonymous; "
                f"peak of a process {found['peak_rss'] / 1e6:.0f} MB; {found['said']}",
                flush=True,
            )


def _speculation(options: argparse.Namespace, variant: str) -> list[str]:
    """Return the options of ``vllm serve`` for a variant."""
    if variant == "dense":
        return []
    model = options.model
    if variant == "copied":
        model = str(options.folder / "copy" / Path(options.model).name)
        shutil.copytree(options.model, model, dirs_exist_ok=True)
    return speculation(options, model)


def _measure(options: argparse.Namespace, drafting: list[str]) -> dict[str, Any]:
    port = free_port()
    log = options.folder / "server.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model),
        *(*OPTIONS, *drafting, "--host", "127.0.0.1", "--port", str(port)),
    ]
    server = Server(command, port, log, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        server.wait(400)
        client = Client(server.url)
        model = client.model()
        answers = [client.complete(model, text, 64, score=False).text for text in PROMPTS]
        time.sleep(2)
        return {
            **_memory(server.process.pid),
            "answers": answers,
            "said": " ".join(_SAID.findall(log.read_text())) or None,
        }
    finally:
        server.stop()


def _memory(pid: int) -> dict[str, int]:
    """Sum up a process and its descendants, in bytes; `peak_rss` is of the largest alone."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    sums = {"Pss": 0, "Pss_Anon": 0}
    peaks = []
    for process in processes:
        proc = Path("/proc") / str(process.pid)
        for line in (proc / "smaps_rollup").read_text().splitlines()[1:]:
            key, _, value = line.partition(":")
            if key in sums:
                sums[key] += int(value.split()[0]) << 10
        lines = (proc / "status").read_text().splitlines()
        peaks += [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
    return {
        "processes": len(processes),
        "pss": sums["Pss"],
        "pss_anonymous": sums["Pss_Anon"],
        "peak_rss": max(peaks),
    }


if __name__ == "__main__":
    main()
